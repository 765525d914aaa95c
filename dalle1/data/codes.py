"""Read what `dalle1 encode` wrote: pairs of caption and codes, in any order."""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from dalle1.json_files import parse_json

INDEX_NAME = "codes.json"
COUNT_KEY = "pictures"
"""Key of the number of images in the index."""
FILES = (".npy", ".json")
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a damaged index raises."""

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
        self.folder = folder
        try:
            index = parse_json(folder / self.index_name, dict)
            self.dvae, images = index[self.model_key], index[COUNT_KEY]
            self.grid_size, shards = index["grid_size"], index.get("shards")
            # A stream has no number of images.
            numbers = [self.grid_size, *([shards] if shards else [images, index["shard_size"]])]
            if not all(isinstance(number, int) and number >= 1 for number in numbers):
                raise ValueError(f"it has sizes of {numbers}")
            expected = shards or -(-images // index["shard_size"])
        except DAMAGE as error:
            raise ValueError(
                f"{folder} holds no codes: expected {self.index_name} and shards, as "
                f"`{self.command}` writes them"
            ) from error
        self.shards = shards_in(folder)
        if len(self.shards) != expected:
            raise ValueError(
                f"{folder} holds {len(self.shards)} of {expected} shards: its encoding was "
                "stopped; the same command resumes it"
            )
        self.sizes, entries = sizes_of(self.shards), None
        if index.get("bytes") == self.sizes:
            entries = _read_entries(folder / ENTRIES_NAME)
        if entries is None:
            entries = index_files(self.shards, FILES)
        self.codebook_size: int | None = index.get("codebook_size")
        self.numbers: int | None = index.get("numbers")
        self.noise = [f"noise {index.get('seed')}"] if index.get("sample_codes") else []
        kept = split_indices(range(len(entries)), split)
        self.entries = entries[kept.start : kept.stop]

    def __len__(self) -> int:
        return len(self.entries)

    def digest(self) -> str:
        positions = hashlib.sha256(np.ascontiguousarray(self.entries).data).hexdigest()
        names = [shard.name for shard in self.shards]
        return names_digest([self.dvae, positions, *self.noise, *names])

    def find(self, index: int) -> CodeSample:
        return CodeSample(self, index, index)

    def captions(self, index: int) -> list[str]:
        """Return all captions of pair `index`."""
        with self._one_error(index):
            captions = parse_json(self._read(index, 3), dict)["captions"]
            if not captions or not all(isinstance(caption, str) for caption in captions):
                raise ValueError("it has no captions")
            return captions

    def caption(self, index: int, rng: random.Random) -> str:
        return rng.choice(self.captions(index))

    def crops(self, index: int) -> np.ndarray:
        """Return the codes of all crops of pair `index`: [crops, W, W]."""
        with self._one_error(index):
            content = self._read(index, 1)
            begin = 10 + int.from_bytes(content[8:10], "little")
            shape, kind = _form(content[:begin])
            crops = np.frombuffer(content, kind, offset=begin).reshape(-1, *shape[-2:])
            if not crops.size or kind.kind not in "uif":
                raise ValueError(f"it has {kind} of shape {shape}")
            return crops

    def codes(self, index: int, rng: random.Random) -> Tensor:
        """Return the codes of one of the crops of sample `index`: [W, W], int64."""
        codes = rng.choice(self.crops(index)).astype(np.int64)
        with self._one_error(index):
            if codes.shape != (self.grid_size, self.grid_size):
                raise ValueError(f"it has codes of shape {codes.shape}")
            if codes.min() < 0 or codes.max() >= (self.codebook_size or math.inf):
                raise ValueError(f"it has codes of {codes.min()} to {codes.max()}")
        return torch.from_numpy(codes)

    @contextmanager
    def _one_error(self, index: int) -> Iterator[None]:
        """Turn what a damaged index or shard causes into a ValueError that names it."""
        number, *spans = self.entries[index].tolist()
        if not 0 <= number < len(self.shards) or not all(
            offset >= 0 and 0 <= size <= self.sizes[number] - offset
            for offset, size in (spans[:2], spans[2:])
        ):
            raise ValueError(
                f"{self.folder / ENTRIES_NAME} is damaged: its pair {index} lies in no shard; move "
                "it away, and the same command builds it again"
            )
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # damaged bytes fail in any way
            shard = self.shards[number]
            why = " ".join(str(error).split())[:100]
            raise ValueError(
                f"{shard} is damaged: its pair {index} cannot be read ({why}); move it away and "
                f"run `{self.command}` again"
            ) from error

    def _read(self, index: int, first: int) -> bytes:
        number, offset, size = self.entries[index, [0, first, first + 1]].tolist()
        return read_member(self.shards[number], (offset, size))


def _read_entries(path: Path) -> np.ndarray | None:
    """Map the index of pairs, None where it is missing or no such index."""
    try:
        entries = np.load(path, mmap_mode="r")
        return entries if entries.dtype == np.int64 and entries.shape[1:] == (5,) else None
    except Exception:  # damaged bytes fail in any way
        return None


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
