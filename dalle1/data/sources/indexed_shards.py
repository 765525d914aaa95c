"""Local WebDataset shards, read in random order through an index that is built on opening."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from dalle1.data.cleaning import (
    CAPTIONS,
    IMAGE_SUFFIXES,
    captions_in,
    read_image,
    sample_caption,
)
from dalle1.data.skipped import BadSample, ShardLosses, ShardRead, SkippedSample
from dalle1.data.sources.base import ReadOptions, split_indices
from dalle1.data.sources.indexed import IndexedSource

Span = tuple[int, int]
"""Offset and size in bytes of a file within a shard."""


class IndexedShards(IndexedSource):
    """Local shards in img2dataset's layout: `KEY.jpg` (png, webp, gif), `KEY.txt` or `KEY.json`.

    A pair takes 48 bytes of memory, whatever its key.

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
        rows: list[tuple[int, ...]] = []
        for number, shard in enumerate(shards):
            rows += self._index(number, shard)
        if not rows:
            first = f"; the first skipped is {self.skipped[0]}" if self.skipped else ""
            raise ValueError(
                f"no usable samples in {len(shards)} shards, {shards[0]} the first: expected an "
                f"image and a .txt or .json under the same name{first}"
            )
        losses = ShardLosses(self.options.cleaning.max_bad_fraction)
        losses.add(sorted(self.shards_read, key=lambda shard: not shard.complete), len(shards))
        # Shard, image's span, caption's span, caption's suffix: as numbers, forked workers
        # share them.
        table = np.array(rows, dtype=np.int64)
        kept = split_indices(range(len(rows)), split)
        self.entries = table[kept.start : kept.stop]

    def _index(self, number: int, shard: Path) -> Iterator[tuple[int, ...]]:
        samples, damage = index_shard(shard)
        before, kept = len(self.skipped), 0
        if damage:
            self.skipped.append(damage)
        for i, (key, files) in enumerate(samples.items()):
            lacking = missing_files(files, self.options.captions)
            if lacking is None:
                image = next(files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files)
                suffix = next((s for s in CAPTIONS if s in files), "")
                kind = CAPTIONS.index(suffix) if suffix else -1
                kept += 1
                yield (number, *image, *files.get(suffix, (0, 0)), kind)
            elif not (damage and i == len(samples) - 1):  # else it is what was cut off
                self.skipped.append(SkippedSample.because(lacking, f"{key} in {shard}"))
        met = kept + len(self.skipped) - before
        self.shards_read.append(ShardRead(str(shard), met, not damage))

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        number, offset = (int(value) for value in self.entries[index][:2])
        shard = self.shards[number]
        try:
            header = read_member(shard, (offset - tarfile.BLOCKSIZE, 100))
        except OSError:  # it could be read when it was indexed
            return f"pair {index} in {shard}"
        return f"{header.partition(bytes(1))[0].decode(errors='replace')} in {shard}"

    def _read(self, index: int, first: int) -> bytes:
        number, offset, size = self.entries[index, [0, first, first + 1]].tolist()
        try:
            return read_member(self.shards[number], (offset, size))
        except OSError as error:
            raise BadSample("unreadable file", f"{error}", str(self.shards[number])) from error

    def caption(self, index: int, rng: random.Random) -> str:
        suffix = CAPTIONS[self.entries[index][5]]
        with self._naming(index):
            captions = captions_in(self._read(index, 3), suffix, "")
            return sample_caption(captions, "", self.options.cleaning, rng)

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


def missing_files(files: Mapping[str, Any], captions: bool) -> BadSample | None:
    """Return what a sample lacks, by the suffixes of its files; None where it is complete."""
    present = ", ".join(files)
    if not any(suffix in files for suffix in IMAGE_SUFFIXES):
        return BadSample("no image", f"its only files are {present}")
    if captions and not any(suffix in files for suffix in CAPTIONS):
        return BadSample("no caption", f"its only files are {present}")
    return None


class _Header(tarfile.TarInfo):
    """A member's header; an invalid one is an error, where `tarfile` would take it for the end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the two empty blocks
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, and no end mark") from error


def members(
    file: IO[bytes], mode: Any
) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """Yield key, suffix, member and archive of each file of a shard.

    Raises: tarfile.TarError where the shard ends before its end mark.
    """
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_Header, bufsize=1 << 18) as tar:
        for member in tar:
            if member.isfile():
                # WebDataset's rule: the key ends at the first dot of the name, whatever the folder.
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                yield folder + slash + stem, dot + suffix.lower(), member, tar


def index_shard(shard: Path) -> tuple[dict[str, dict[str, Span]], SkippedSample | None]:
    """Find the samples of a .tar shard, by key, each as suffix → span; and what damage it has."""
    samples: dict[str, dict[str, Span]] = {}
    try:
        with shard.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            # "r:", as in a compressed one, offsets would mean nothing.
            for key, suffix, member, _ in members(file, "r:"):
                if member.offset_data + member.size <= size:
                    samples.setdefault(key, {})[suffix] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        cause = "shard cut short" if samples else "unreadable shard"
        return samples, SkippedSample(cause, str(shard), f"{error}")
    return samples, None


def read_member(shard: Path, span: Span) -> bytes:
    """Read one file out of a shard."""
    with shard.open("rb") as file:
        file.seek(span[0])
        return file.read(span[1])
