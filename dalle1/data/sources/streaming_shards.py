"""Shards read front to back: those behind a URL or a command, and local ones of many gigabytes.

What is read is a pure function of the seed, the reader's number and the count of readers, so a
training goes on where it stopped: a place is a few numbers. Each reader shuffles whole shards in
every epoch, and the pairs of each `BLOCK` that it reads in a row.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import IO, Any

from PIL import Image

from dalle1.data.cleaning import (
    CAPTIONS,
    PICTURES,
    CleaningConfig,
    captions_in,
    read_image,
    sample_caption,
)
from dalle1.data.skipped import FEW_SHARDS, LOST, BadSample, ShardLosses, ShardRead, SkippedSample
from dalle1.data.sources.base import turn
from dalle1.data.sources.indexed_shards import lacks, members

BLOCK = 1_000
"""Pairs that are shuffled at a time; at 30 kB each, 30 MB a reader."""

SCHEMES = ("pipe", "http", "https", "s3", "gs", "hf", "file")
"""What webdataset opens; s3 by the `aws` command."""

Place = list[Any]
"""[pairs given so far, for each group of shards [epoch, shards read, samples read, of a block]]."""


@dataclass(frozen=True)
class Pair:
    """One sample of a stream: a source of a single pair, with its index 0."""

    files: Mapping[str, bytes]
    where: str
    reading: CleaningConfig
    detail: int

    def __len__(self) -> int:
        return 1

    def name(self, index: int = 0) -> str:
        return self.where

    def caption(self, index: int, rng: random.Random) -> str:
        suffix = next(suffix for suffix in CAPTIONS if suffix in self.files)
        captions = captions_in(self.files[suffix], suffix, self.where)
        return sample_caption(captions, self.where, self.reading, rng)

    def image(self, index: int) -> Image.Image:
        content = next(self.files[suffix] for suffix in PICTURES if suffix in self.files)
        return read_image(content, self.where, self.reading, self.detail)


Found = Pair | SkippedSample | ShardRead
"""What a shard gives: pairs, what is damaged, and what was read of it."""


class StreamingShards:
    """Groups of shards, by URL or path, read front to back.

    Of each group's last shard, every 20th sample, at most 512, is kept to validate on.

    Args:
        groups: the shards of each source.
        weights: the groups' shares of what is read. None: there is one group.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        weights: Sequence[float] | None = None,
        split: str = "train",
        captions: bool = True,
        reading: CleaningConfig | None = None,
        detail: int = 0,
    ) -> None:
        self.groups, self.weights = groups, list(weights or [1.0])
        self.split, self.captions = split, captions
        self.reading, self.detail = reading or CleaningConfig(), detail
        self.pictures = True

    def without_pictures(self) -> StreamingShards:
        """Give the same stream with empty pictures, which takes no memory for them."""
        other = copy(self)
        other.pictures = False
        return other

    def shard(self, url: str, first: int = 0) -> Iterator[tuple[int, Found]]:
        """Yield number and sample, or what is damaged, of one shard from number `first` on.

        At the end comes what was read of it.
        """
        last, end, whole = any(url == group[-1] for group in self.groups), 0, True
        for number, (key, files, lacking) in enumerate(self._samples(url)):
            end, whole = number + 1, lacking is None or lacking.cause not in LOST
            if number < first or (last and self._is_others(number)):
                continue
            if lacking:
                yield number, SkippedSample.because(lacking, f"{key} in {url}" if key else url)
            else:
                yield number, Pair(files, f"{key} in {url}", self.reading, self.detail)
        if end >= first:
            yield end, ShardRead(url, end, whole)

    def _is_others(self, number: int) -> bool:
        held = number % 20 == 19 and number < 20 * 512
        return {"train": held, "validation": not held}.get(self.split, False)

    def _samples(self, url: str) -> Iterator[tuple[str, dict[str, bytes], BadSample | None]]:
        """Yield key, files and what they lack; at the end, what cut the shard short, if it was."""
        key, files, damage = "", dict[str, bytes](), None
        try:
            with open_shard(url) as stream:
                for found, suffix, member, tar in members(stream, "r|*"):
                    if found != key and files:
                        yield key, files, lacks(files, self.captions)
                        files = {}
                    key = found
                    wanted = self.pictures or suffix not in PICTURES
                    content = tar.extractfile(member) if wanted else None
                    files[suffix] = content.read() if content else b""
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                while stream.read(1 << 16):  # a command whose output nobody reads would fail
                    pass
        except (tarfile.TarError, OSError, EOFError) as error:
            cause = "shard cut short" if key else "unreadable shard"
            damage = BadSample(cause, f"{error}")
        if files and not (damage and lacks(files, self.captions)):  # else it is what was cut off
            yield key, files, lacks(files, self.captions)
        if damage:
            yield "", {}, damage

    def held_out(self) -> Iterator[Pair | SkippedSample]:
        """Yield the pairs to validate on: of the groups' last shards."""
        for group in self.groups:
            found = False
            for pair in self._in(group[-1]):
                found = found or isinstance(pair, Pair)
                yield pair
            if not found:  # too few to spare any
                whole = StreamingShards(
                    [group], None, "encode", self.captions, self.reading, self.detail
                )
                yield from whole._in(group[-1])

    def _in(self, url: str) -> Iterator[Pair | SkippedSample]:
        yield from (found for _, found in self.shard(url) if not isinstance(found, ShardRead))

    def once(self) -> Iterator[Pair | SkippedSample]:
        """Yield every sample once, in the order of the shards."""
        for group in self.groups:
            for url in group:
                yield from self._in(url)

    def smallest(self) -> int:
        """Give the number of shards of the smallest group."""
        return min(len(group) for group in self.groups)

    def read(
        self, reader: int, readers: int, seed: int, place: Place | None = None
    ) -> Iterator[tuple[Found, Place]]:
        """Yield pairs for ever, as reader number `reader` of `readers`, each with the place after.

        Raises: ValueError where as many shards as there are have nothing to read, one after
            another, or where too much cannot be read.
        """
        count, *places = place or [0, *([0, 0, 0, 0] for _ in self.groups)]
        streams = [
            self._endless(group, reader, readers, f"{seed}/{i}", tuple(places[i]))
            for i, group in enumerate(self.groups)
        ]
        while True:
            i, _ = turn(count, self.weights)
            pair, places[i] = next(streams[i])
            count += isinstance(pair, Pair)
            yield pair, [count, *places]

    def _endless(
        self, group: Sequence[str], reader: int, readers: int, seed: str, place: tuple[int, ...]
    ) -> Iterator[tuple[Found, list[int]]]:
        epoch, first, offset, done = place
        losses = ShardLosses(self.reading.max_bad_fraction)
        empty = 0  # shards in a row, about: a reader may have few, and others the good ones
        while True:
            found, reason = False, SkippedSample("no picture", group[0], "the shards are empty")
            for block in self._blocks(group, epoch, reader, readers, seed, first, offset):
                start, pairs, others = block
                # Where only part of a block is left, those who had the rest were told of these.
                for other in others if done == 0 else ():
                    if isinstance(other, SkippedSample):
                        reason = other
                    else:  # here, too, since where nothing can be read no batch is ever full
                        losses.add([other])
                    yield other, [epoch, *start, done]
                random.Random(f"{seed}/{reader}/{epoch}/{start}").shuffle(pairs)
                for i, pair in enumerate(pairs[done:], done + 1):
                    yield pair, [epoch, *start, i]
                found, done = found or bool(pairs), 0
            empty = 0 if found or first or offset else empty + max(1, len(group) // readers)
            if empty >= len(group):
                raise ValueError(
                    f"there is no pair in {len(group)} shards, {group[0]} the first; the last was "
                    f"left out: {reason.where} ({reason.cause}: {reason.why})"
                )
            epoch, first, offset = epoch + 1, 0, 0

    def _blocks(
        self,
        group: Sequence[str],
        epoch: int,
        reader: int,
        readers: int,
        seed: str,
        first: int,
        offset: int,
    ) -> Iterator[tuple[tuple[int, int], list[Pair], list[SkippedSample | ShardRead]]]:
        """Yield the rest of an epoch in blocks: where each begins, its pairs, and what else is."""
        order = shards_of_reader(len(group), reader, readers, f"{seed}/{epoch}")
        start, pairs, others = (first, offset), list[Pair](), list[SkippedSample | ShardRead]()
        damaged = 0
        for number in range(first, len(order)):
            for at, sample in self.shard(group[order[number]], offset):
                if isinstance(sample, Pair):
                    pairs.append(sample)
                else:
                    others.append(sample)
                    damaged += isinstance(sample, SkippedSample)
                if len(pairs) == BLOCK or damaged == FEW_SHARDS:
                    yield start, pairs, others
                    start, pairs, others, damaged = (number, at + 1), [], [], 0
            offset = 0
        if pairs or others:
            yield start, pairs, others


def shards_of_reader(shards: int, reader: int, readers: int, seed: str) -> list[int]:
    """Give the shards of an epoch that one of several readers reads, in its order.

    Every shard has one reader where there are enough of them; otherwise each reader draws some.
    """
    if shards < readers:
        return random.Random(f"{seed}/{reader}").choices(range(shards), k=shards)
    order = list(range(shards))
    random.Random(seed).shuffle(order)
    return order[reader::readers]


@contextmanager
def open_shard(url: str) -> Iterator[IO[bytes]]:
    """Open a shard by webdataset's openers: a path, pipe:COMMAND, http(s)://, s3://, gs://, hf://.

    Raises: OSError where it cannot be opened, or, when it is read, where its command fails.
    """
    from webdataset.gopen import gopen

    stream = gopen(f"pipe:aws s3 cp {url} -" if url.startswith("s3://") else url, "rb")
    try:
        yield stream
    finally:
        with suppress(OSError):  # of a command that was not read to its end
            stream.close()
