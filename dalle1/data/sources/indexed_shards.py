"""Local WebDataset shards, read in random order through an index that is built on opening."""

from __future__ import annotations

import hashlib
import os
import random
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from dalle1.data.cleaning import CAPTIONS, captions_among, read_image, sample_caption
from dalle1.data.skipped import BadSample, ShardLosses, ShardRead, SkippedSample, first_skipped
from dalle1.data.sources.base import ReadOptions, names_digest, split_indices
from dalle1.data.sources.indexed import IndexedSource
from dalle1.data.sources.shard_members import (
    Asides,
    ShardSample,
    Unreadable,
    group_samples,
    image_suffix,
    join_apart,
    mark_last,
    missing_files,
    note_further_images,
    printable,
    read_members,
    skipped_sample,
    unreadable,
)

Span = tuple[int, int]
"""Offset and size in bytes of a file within a shard."""

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of a compressed file → the command that decompresses it."""


class IndexedShards(IndexedSource):
    """Local shards in img2dataset's layout: `KEY.jpg` (or another image), `KEY.txt`, `KEY.json`.

    A pair takes 56 bytes of memory, whatever its key.

    Attributes:
        skipped: samples without an image or caption, and shards that end too early.
        shards_read: each shard, with how much of it could be read.

    Raises: ValueError where there is no pair, or too many shards are damaged.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        split: str = "train",
        options: ReadOptions | None = None,
    ) -> None:
        self.shards, self.options = shards, options or ReadOptions()
        self.skipped: list[SkippedSample] = []
        self.shards_read: list[ShardRead] = []
        self.stamps: list[Stamp | None] = []
        # Shard; offset and size of image, .txt and .json: as numbers, forked workers share them.
        numbers = array("q")
        for number, shard in enumerate(shards):
            for row in self._index(number, shard):
                numbers.extend(row)
        if not numbers:
            raise ValueError(
                f"no usable samples in {len(shards)} shards, {shards[0]} the first: expected an "
                f"image and a .txt or .json under the same name{first_skipped(self.skipped)}"
            )
        losses = ShardLosses(self.options.cleaning.max_bad_fraction)
        losses.add(sorted(self.shards_read, key=lambda shard: not shard.complete), len(shards))
        table = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 7)
        kept = split_indices(range(len(table)), split)
        self.entries = table[kept.start : kept.stop]

    def _index(self, number: int, shard: Path) -> Iterator[tuple[int, ...]]:
        index, before, kept = index_shard(shard), len(self.skipped), 0
        self.stamps.append(index.stamp)
        if index.damage:
            self.skipped.append(index.damage)
        for sample, is_last in mark_last(index.samples):
            if lacking := missing_files(sample, self.options.captions):
                if not (index.damage and is_last):
                    self.skipped.append(skipped_sample(sample, lacking, str(shard)))
                continue
            note_further_images(sample, index.asides)
            kept += 1
            spans = (sample.files.get(suffix, (0, 0)) for suffix in CAPTIONS)
            yield (number, *sample.files[image_suffix(sample.files)], *chain(*spans))
        met = kept + len(self.skipped) - before
        self.shards_read.append(ShardRead(str(shard), met, not index.damage))
        self.skipped += index.asides.skipped(str(shard))

    def __len__(self) -> int:
        return len(self.entries)

    def digest(self) -> str:
        positions = hashlib.sha256(np.ascontiguousarray(self.entries).data).hexdigest()
        return names_digest([positions, *(shard.name for shard in self.shards)])

    def name(self, index: int) -> str:
        number, offset = (int(value) for value in self.entries[index][:2])
        shard = self.shards[number]
        try:
            header = read_member(shard, (offset - tarfile.BLOCKSIZE, 100))
        except OSError:  # it could be read when it was indexed
            return f"pair {index} in {shard}"
        return f"{header.partition(bytes(1))[0].decode(errors='replace')} in {shard}"

    def _read(self, index: int, column: int) -> bytes:
        number, offset, size = self.entries[index, [0, column, column + 1]].tolist()
        try:
            return read_member(self.shards[number], (offset, size), self.stamps[number])
        except OSError as error:
            raise BadSample("unreadable file", f"{error}", str(self.shards[number])) from error

    def caption(self, index: int, rng: random.Random) -> str:
        with self._naming(index):
            columns = (column for column in (3, 5) if self.entries[index][column + 1])
            files = {CAPTIONS[column > 3]: self._read(index, column) for column in columns}
            return sample_caption(captions_among(files, ""), "", self.options.cleaning, rng)

    def image(self, index: int) -> Image.Image:
        with self._naming(index):
            content, options = self._read(index, 1), self.options
            return read_image(content, "", options.cleaning, options.decode_size)

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Name the pair in errors only, since looking its name up reads the shard again."""
        try:
            yield
        except BadSample as error:
            raise BadSample(error.cause, error.why, error.where or self.name(index)) from error


Stamp = tuple[int, int]
"""Size and time of a shard's last change."""


@dataclass
class ShardIndex:
    """What a local shard holds."""

    samples: list[ShardSample[Span]] = field(default_factory=list)
    damage: SkippedSample | None = None
    asides: Asides = field(default_factory=Asides)
    stamp: Stamp | None = None


def index_shard(shard: Path) -> ShardIndex:
    """Find the samples of a .tar shard, complete or not."""
    index, damage = ShardIndex(), list[Exception]()
    index.samples = join_apart([*group_samples(_spans(shard, index, damage))])
    if damage:
        cause = "shard cut short" if index.samples else "unreadable shard"
        index.damage = SkippedSample(cause, str(shard), f"{damage[0]}")
    return index


def _spans(
    shard: Path, index: ShardIndex, damage: list[Exception]
) -> Iterator[tuple[str, Span | Unreadable]]:
    """Yield name and span of each member; note what is found besides."""
    begin, count = b"", 0
    try:
        with shard.open("rb") as file:
            index.stamp = stamp_of(file)
            begin = file.read(8)
            file.seek(0)
            # "r:", as in a compressed one, offsets would mean nothing.
            for member, _ in read_members(file, "r:", index.asides):
                count += 1
                if member.offset_data + member.size <= index.stamp[0]:
                    span = member.offset_data, member.size
                    yield member.name, unreadable(member) or span
    except (tarfile.TarError, OSError) as error:
        packed = [name for magic, name in COMPRESSED.items() if begin.startswith(magic)]
        if packed and not count:
            why = f"it is compressed; use --data 'pipe:{packed[0]} -dc {shard}'"
            damage.append(tarfile.ReadError(why))
        else:
            damage.append(error)


def index_files(shards: Sequence[Path], suffixes: Sequence[str]) -> np.ndarray:
    """Return shard, and offset and size of each file, of all samples: int64 [N, 1 + 2 × files].

    Raises: ValueError where a shard is damaged, or a sample lacks one of the files.
    """
    rows: list[tuple[int, ...]] = []
    for number, shard in enumerate(shards):
        index, remedy = index_shard(shard), "remove the shard, and encode it again"
        if index.damage:
            raise ValueError(f"{shard} is damaged ({index.damage.why}); {remedy}")
        for sample in index.samples:
            if not sample.files.keys() >= {*suffixes}:
                raise ValueError(
                    f"{printable(sample.key)} in {shard} has {', '.join(sample.files) or 'no file'}"
                    f", expected {' and '.join(suffixes)}; {remedy}"
                )
            rows.append((number, *chain(*(sample.files[suffix] for suffix in suffixes))))
    return np.array(rows, dtype=np.int64).reshape(-1, 1 + 2 * len(suffixes))


def stamp_of(file: IO[bytes]) -> Stamp:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def read_member(shard: Path, span: Span, stamp: Stamp | None = None) -> bytes:
    """Read one file out of a shard.

    Raises: OSError where the shard is gone, or differs from its `stamp`.
    """
    with shard.open("rb") as file:
        if stamp not in (None, stamp_of(file)):
            raise OSError("the shard has changed since it was opened; start the command again")
        file.seek(span[0])
        return file.read(span[1])
