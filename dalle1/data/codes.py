"""Read what `dalle1 encode` wrote: pairs of caption and codes, in any order."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle1.data.sources.base import is_hidden, names_digest, split_indices
from dalle1.data.sources.indexed import IndexedSample, IndexedSource
from dalle1.data.sources.indexed_shards import index_files, read_member
from dalle1.data.sources.mixture import Mixture
from dalle1.data.spec import split_names
from dalle1.image_tokenizer import ImageTokenizer, image_tokenizer_file

INDEX_NAME = "codes.json"
FILES = (".npy", ".json")

ENTRIES_NAME = "entries.npy"
"""Index of the pairs: shard, and offset and size of the codes and of the captions; int64 [N, 5]."""


def fingerprint(dvae_dir: Path) -> str:
    """Return a hash of a dVAE's file, which distinguishes its codes from another dVAE's."""
    return hashlib.sha256(image_tokenizer_file(dvae_dir).read_bytes()).hexdigest()[:16]


class CodeSample(IndexedSample):
    """A sample that holds codes instead of an image."""

    def codes(self, rng: random.Random) -> Tensor:
        """Return the codes of one of its crops, at random: [W, W], int64."""
        return self.source.codes(self.index, rng)


class CodeSource(IndexedSource):
    """Pairs of caption and codes (or other encodings), read from their shards on demand.

    A pair takes 40 bytes, memory-mapped from `ENTRIES_NAME` and shared by all processes of a
    machine. Where that file is missing or the shards have changed, each process builds its own.
    """

    index_name = INDEX_NAME
    command = "dalle1 encode"
    model_key = "dvae"
    """Name in the index of what identifies the model that encoded the images."""

    def __init__(self, folder: Path, split: str = "train") -> None:
        try:
            index = json.loads((folder / self.index_name).read_text())
            self.dvae, images = index[self.model_key], index["pictures"]
            self.grid_size: int = index["grid_size"]
            expected = index.get("shards") or -(-images // index["shard_size"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder} holds no codes: expected {self.index_name} and shards, as "
                f"`{self.command}` writes them"
            ) from error
        shards = shards_in(folder)
        if len(shards) != expected:
            raise ValueError(
                f"{folder} holds {len(shards)} of {expected} shards: its encoding was stopped; the "
                "same command resumes it"
            )
        path = folder / ENTRIES_NAME
        known = path.is_file() and index.get("bytes") == sizes_of(shards)
        entries = np.load(path, mmap_mode="r") if known else index_files(shards, FILES)
        kept = split_indices(range(len(entries)), split)
        self.shards, self.entries = shards, entries[kept.start : kept.stop]

    def __len__(self) -> int:
        return len(self.entries)

    def digest(self) -> str:
        positions = hashlib.sha256(np.ascontiguousarray(self.entries).data).hexdigest()
        return names_digest([self.dvae, positions, *(shard.name for shard in self.shards)])

    def find(self, index: int) -> CodeSample:
        return CodeSample(self, index, index)

    def captions(self, index: int) -> list[str]:
        """Return all captions of pair `index`."""
        return json.loads(self._read(index, 3))["captions"]

    def caption(self, index: int, rng: random.Random) -> str:
        return rng.choice(self.captions(index))

    def crops(self, index: int) -> np.ndarray:
        """Return the codes of all crops of pair `index`: [crops, W, W]."""
        content = self._read(index, 1)
        begin = 10 + int.from_bytes(content[8:10], "little")
        shape, kind = _form(content[:begin])
        return np.frombuffer(content, kind, offset=begin).reshape(-1, *shape[-2:])

    def codes(self, index: int, rng: random.Random) -> Tensor:
        """Return the codes of one of the crops of sample `index`: [W, W], int64."""
        return torch.from_numpy(rng.choice(self.crops(index)).astype(np.int64))

    def _read(self, index: int, first: int) -> bytes:
        number, offset, size = self.entries[index, [0, first, first + 1]].tolist()
        return read_member(self.shards[number], (offset, size))


@lru_cache(maxsize=8)
def _form(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Return an array's shape and dtype by its .npy header, which most arrays share."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, _, kind = np.lib.format.read_array_header_1_0(file)
    return shape, kind


def shards_in(folder: Path) -> list[Path]:
    """Return the shards of encodings in a folder, in order."""
    return sorted(path for path in folder.glob("*.tar") if not is_hidden(path.name))


def sizes_of(shards: Sequence[Path]) -> list[int]:
    """Return the size of each shard in bytes."""
    return [shard.stat().st_size for shard in shards]


def open_codes(
    data: str, split: str, dvae_dir: Path, image_tokenizer: ImageTokenizer
) -> CodeSource | Mixture | None:
    """Open --data if it is a folder of codes, or several; refuse those of another dVAE or grid."""
    names, weights = split_names(data)
    coded = [os.path.isfile(os.path.join(name, INDEX_NAME)) for name in names]
    if not any(coded):
        return None
    if not all(coded):
        raise ValueError(f"data is {data!r}: {names[coded.index(False)]} holds no codes; encode it")
    sources = [CodeSource(Path(name), split) for name in names]
    for name, source in zip(names, sources, strict=True):
        if source.dvae != fingerprint(dvae_dir):
            raise ValueError(
                f"the codes in {name} are of another dVAE than {dvae_dir}; encode the data again"
            )
        if source.grid_size != image_tokenizer.grid_size:
            image_size = image_tokenizer.downsampling * source.grid_size
            raise ValueError(
                f"the codes in {name} are grids of {source.grid_size}, expected "
                f"{image_tokenizer.grid_size}; use --image-size {image_size}, or encode the data "
                "again"
            )
    return sources[0] if len(sources) == 1 else Mixture(sources, weights)
