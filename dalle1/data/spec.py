"""Parses --data and opens it: Toybox, a folder, shards; one of them or several."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from braceexpand import braceexpand

from dalle1.console import expand_home
from dalle1.data.cleaning import IMAGE_SUFFIXES
from dalle1.data.skipped import SkippedFiles, SkippedSample
from dalle1.data.sources.base import ReadOptions, Source, is_hidden
from dalle1.data.sources.file_tree import LISTS, OTHER_LISTS
from dalle1.data.sources.folder import Folder
from dalle1.data.sources.indexed import IndexedSource
from dalle1.data.sources.indexed_shards import IndexedShards
from dalle1.data.sources.mixture import Mixture
from dalle1.data.sources.streaming_shards import SCHEMES, StreamingShards

INDEXED_BYTES = 16 << 30
"""Total size above which local shards are streamed: indexing takes a minute per 10 GiB."""

COMPRESSED_NAMES = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Suffixes of compressed files → the command that decompresses them."""


def open_source(data: str, split: str = "train", options: ReadOptions | None = None) -> Source:
    """Open what --data names.

    Args:
        data: `toybox`, `toybox:N`, a folder of images and captions, or a folder, glob or
            {000..123} pattern of .tar shards, also behind pipe:, http(s):// or s3://; or several
            of these, separated by commas, each perhaps with a weight: `a::2,b::1`.
        split: train, validation (other scenes of Toybox, or the end of a user's data), or encode.

    Raises: ValueError where there is no such data.
    """
    options = options or ReadOptions()
    names, weights = split_names(data)
    shards = [shards_of(name) for name in names]
    if not any(map(_must_stream, shards)):
        return _open_indexed(names, weights, shards, split, options)
    for name, group in zip(names, shards, strict=True):
        if not group:
            raise ValueError(
                f"{name} is not shards, and cannot be mixed with streamed shards; if it is part "
                "of a command or URL, put quotes around it or write its comma as %2C"
            )
    groups = shards if weights else [[url for group in shards for url in group]]
    source = StreamingShards(groups, weights, split, options)
    source.skipped = [sample for name in names for sample in _beside_shards(name)]
    return source


def open_indexed(
    data: str, split: str = "train", options: ReadOptions | None = None
) -> IndexedSource:
    """Open what --data names, as `open_source` does, for reading in any order.

    Raises: ValueError where it can only be read front to back, or there is no such data.
    """
    names, weights = split_names(data)
    shards = [shards_of(name) for name in names]
    if any(map(_must_stream, shards)):
        raise ValueError(f"{data} can only be read front to back; use fewer, local shards")
    return _open_indexed(names, weights, shards, split, options or ReadOptions())


def _open_indexed(
    names: Sequence[str],
    weights: Sequence[float] | None,
    shards: Sequence[Sequence[str]],
    split: str,
    options: ReadOptions,
) -> IndexedSource:
    sources: list[IndexedSource] = []
    for name, group in zip(names, shards, strict=True):
        if group:
            opened = IndexedShards([Path(path) for path in group], split, options)
            opened.skipped += _beside_shards(name)
            sources.append(opened)
        elif os.path.isdir(name):
            sources.append(Folder(Path(name), split, options))
        else:
            sources.append(_open_toybox(name, split, options))
    return sources[0] if len(sources) == 1 else Mixture(sources, weights)


def _open_toybox(data: str, split: str, options: ReadOptions) -> IndexedSource:
    name, _, count = data.partition(":")
    if name != "toybox":
        packed = next((path for path in expand(data) if path.endswith((*COMPRESSED_NAMES,))), "")
        if os.path.exists(packed):
            command = COMPRESSED_NAMES[os.path.splitext(packed)[1]]
            raise ValueError(
                f"{packed} is compressed, expected a .tar; decompress it, or use --data "
                f"'pipe:{command} -dc {data}'"
            )
        raise ValueError(
            f"no data at {data!r}: expected toybox, a folder of images beside .txt captions, or "
            "WebDataset shards (.tar), local or by pipe:COMMAND, http(s):// or s3://"
        )
    from dalle1.data.sources.toybox import ToyboxSource

    if count and not count.isdecimal():
        raise ValueError(f"data is {data!r}, expected toybox or toybox:N with a number N")
    return ToyboxSource(split, options.size, options.seed, int(count) if count else None)


def shards_of(name: str) -> list[str]:
    """Return the shards that a name stands for: none where it is something else.

    A numbered pattern stands for all of its shards, also missing ones, which are then skipped and
    logged; but for none where all of them are missing.
    """
    if is_remote(name):
        return list(braceexpand(name))
    if os.path.isdir(name):
        paths = [str(path) for path in sorted(Path(name).iterdir()) if not is_hidden(path.name)]
    else:
        paths = expand(name)
    shards = [path for path in paths if path.lower().endswith(".tar")]
    return shards if any(map(os.path.exists, shards)) else []


def expand(pattern: str) -> list[str]:
    """Return the paths that a pattern stands for, by {000..123}, *, ? or [...].

    A path that exists, and the part of a pattern that is an existing folder, are no pattern.
    Backslashes are no escapes: Windows separates folders by them.
    """
    if os.path.exists(pattern):
        return [pattern]
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    paths: list[str] = []
    for rest in braceexpand(pattern[len(folder) :], escape=False):
        if glob.has_magic(rest) and not os.path.exists(folder + rest):
            paths += sorted(glob.glob(glob.escape(folder) + rest))
        else:
            paths.append(folder + rest)
    return paths


def _beside_shards(name: str) -> Iterator[SkippedSample]:
    """Yield what a folder of shards holds besides, however deep, that may be meant as data."""
    if is_remote(name) or not os.path.isdir(name):
        return
    hidden = SkippedFiles("hidden file", f"hidden shards in {name}")
    packed = SkippedFiles("other file", f"in {name}, compressed; decompress what is a shard")
    others = SkippedFiles("other file", f"in {name}, beside shards, and not read")
    for folder, folders, files in os.walk(name):
        folders.sort()
        for file in files:
            relative = Path(folder, file).relative_to(name).as_posix()
            lower = file.lower()
            if lower.endswith(".tar") and is_hidden(relative):
                hidden.add(relative)
            elif is_hidden(relative):
                continue
            elif lower.endswith((*COMPRESSED_NAMES,)):
                packed.add(relative)
            elif (
                lower.endswith(IMAGE_SUFFIXES)
                or lower in LISTS + OTHER_LISTS
                or (lower.endswith(".tar") and "/" in relative)
            ):
                others.add(relative)
    yield from (entry for found in (hidden, packed, others) for entry in found.entries())


def is_remote(name: str) -> bool:
    """Return whether shards are read by a command or over a network."""
    scheme, colon, _ = name.partition(":")
    return bool(colon) and scheme in SCHEMES


def _must_stream(shards: Sequence[str]) -> bool:
    if any(map(is_remote, shards)):
        return True
    return sum(os.path.getsize(s) for s in shards if os.path.exists(s)) > INDEXED_BYTES


def split_names(data: str) -> tuple[list[str], list[float] | None]:
    """Split `a::2,b::1` into names and weights.

    Commas within braces belong to a pattern, and those within quotes to a pipe's command:
    `pipe:cat 'a,b.tar'`. A path that exists under the whole name is one source.

    Raises: ValueError where only some have a weight, a weight is not a positive number, or a quote
        is open.
    """
    if os.path.exists(data):
        return [data], None
    names, weights = [], []
    for word in _split_at_commas(data):
        name, weight = word, None
        if found := re.fullmatch(r"(.*)::([^:/'\"]*)", word, re.DOTALL):
            name, weight = found.groups()
        names.append(expand_home(name))
        weights.append(weight)
    if all(weight is None for weight in weights):
        return names, None
    try:
        numbers = [float(weight) for weight in weights if weight is not None]
        valid = len(numbers) == len(names) and all(1e-6 <= n <= 1e6 for n in numbers)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"data is {data!r}, expected a weight for each source, as in a::2,b::1")
    return names, numbers


def data_name(data: str) -> str:
    """Return a name of the training data `--data` without paths, addresses and credentials."""
    sources, weights = split_names(data)
    names = [_public_name(source) for source in sources]
    if weights:
        names = [f"{name} (weight {w:g})" for name, w in zip(names, weights, strict=True)]
    return ", ".join(names)


def _public_name(source: str) -> str:
    """Return the last part of a path or an address, without what may be secret."""
    if source.startswith("pipe:"):
        return "a stream of shards"
    path = re.split(r"[?#;]", source)[0]  # a query, a fragment, or parameters
    scheme, _, address = path.rpartition("://")
    if scheme:  # the host may have a user and a password before it
        path = address.partition("/")[2]
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].rpartition("@")[2] or "unnamed data"


def _split_at_commas(data: str) -> Iterable[str]:
    depth, begin, quote = 0, 0, ""
    for i, letter in enumerate(data):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and data.startswith("pipe:", begin):
            quote = letter
        else:
            depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0 and not quote:
            yield data[begin:i]
            begin = i + 1
    if quote:
        raise ValueError(f"data is {data!r}: the quote {quote} is never closed")
    yield data[begin:]
