"""Opens what --data names: Toybox, a folder, shards, codes; one of them or several."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from braceexpand import braceexpand

from dalle1.data.cleaning import CleaningConfig
from dalle1.data.sources.base import Mixture, PairSource, split_sources
from dalle1.data.sources.folder import Folder
from dalle1.data.sources.indexed_shards import IndexedShards
from dalle1.data.sources.streaming_shards import SCHEMES, StreamingShards

INDEXED_BYTES = 16 << 30
"""Local shards of more are read front to back: to index them takes a minute for each 10 GiB."""


def open_source(
    data: str,
    split: str = "train",
    size: int = 128,
    seed: int = 0,
    captions: bool = True,
    *,
    reading: CleaningConfig | None = None,
    detail: int = 0,
) -> PairSource | StreamingShards:
    """Open what --data names.

    Args:
        data: `toybox`, `toybox:N`, a folder of pictures and captions, or a folder, glob or
            {000..123} pattern of .tar shards, also behind pipe:, http(s):// or s3://; or several
            of these with commas between, each perhaps with a weight: `a::2,b::1`.
        split: train or validation: other scenes of Toybox, or the end of a user's data. encode is
            all of it; the codes are split in their turn, without the pictures that were left out.
        size: side in pixels that Toybox draws at.
        seed: of Toybox's scenes.
        captions: leave out pictures that have none; stage 1 needs none.
        reading: which pictures and captions are taken, and how.
        detail: pixels of the shorter side that suffice; see `read_image`.

    Raises: ValueError where there is nothing of the kind.
    """
    reading = reading or CleaningConfig()
    names, weights = split_sources(data)
    shards = [shards_of(name) for name in names]
    if any(group and _is_streamed(group) for group in shards):
        for name, group in zip(names, shards, strict=True):
            if not group:
                raise ValueError(
                    f"{name} is no shards, and cannot be mixed with streamed ones; if it is part "
                    "of a command or URL, put quotes around it or write its comma as %2C"
                )
        groups = shards if weights else [[url for group in shards for url in group]]
        return StreamingShards(groups, weights, split, captions, reading, detail)
    sources: list[PairSource] = []
    for name, group in zip(names, shards, strict=True):
        if group:
            paths = [Path(path) for path in group]
            sources.append(IndexedShards(paths, split, captions, reading, detail))
        elif os.path.isdir(name):
            sources.append(Folder(Path(name), split, captions, reading, detail))
        else:
            sources.append(_toybox(name, split, size, seed))
    return sources[0] if len(sources) == 1 else cast(PairSource, Mixture(sources, weights))


def _toybox(data: str, split: str, size: int, seed: int) -> PairSource:
    name, _, count = data.partition(":")
    if name != "toybox":
        raise ValueError(
            f"no data at {data!r}: expected toybox, a folder of pictures beside .txt captions, or "
            "WebDataset shards (.tar), local or by pipe:COMMAND, http(s):// or s3://"
        )
    from dalle1.toybox import Toybox

    if count and not count.isdecimal():
        raise ValueError(f"data is {data!r}, expected toybox or toybox:N with a number N")
    world = "train" if split == "encode" else split
    return Toybox(world, size=size, seed=seed, num_scenes=int(count) if count else None)


def shards_of(name: str) -> list[str]:
    """Give the shards that a name stands for: none where it is something else.

    Of a numbered pattern these are all, also those that are not there, which are then left out and
    named; but none where not one of them is there.
    """
    if is_far(name):
        return list(braceexpand(name))
    if os.path.isdir(name):
        return [str(shard) for shard in sorted(Path(name).glob("*.tar"))]
    paths: list[str] = []
    for pattern in braceexpand(name):
        paths += sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    shards = [path for path in paths if path.endswith(".tar")]
    return shards if any(map(os.path.exists, shards)) else []


def is_far(name: str) -> bool:
    """Say whether shards are read by a command or over a network."""
    scheme, colon, _ = name.partition(":")
    return bool(colon) and scheme in SCHEMES


def _is_streamed(shards: Sequence[str]) -> bool:
    if any(is_far(shard) for shard in shards):
        return True
    return sum(os.path.getsize(s) for s in shards if os.path.exists(s)) > INDEXED_BYTES
