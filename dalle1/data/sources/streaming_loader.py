"""Endless batches of shards that are read front to back, resumed by a cursor.

What is read follows from the seed, the reader's number and the count of readers. A reader takes
some of the shards in each epoch, in shuffled order, and shuffles the samples of each `BLOCK` that
it reads in a row. Every worker process of every rank is one reader.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from dalle1.data.loader import (
    MAX_SKIPPED,
    Batch,
    Example,
    LoaderConfig,
    Prepare,
    State,
    counted,
    prepare_sample,
    run_workers,
    stack,
    too_many_skipped,
)
from dalle1.data.skipped import FEW_SHARDS, IGNORED, ShardLosses, ShardRead, SkippedSample
from dalle1.data.sources.base import ReadOptions, Sample
from dalle1.data.sources.mixture import weighted_round_robin

BLOCK = 1_000
"""Samples that are shuffled at a time; at 30 kB each, 30 MB a reader."""

Found = Sample | SkippedSample | ShardRead
"""What reading a shard yields: samples, what is skipped, and at its end what was read of it."""

Cursor = list[Any]
"""[samples read, for each group of shards [epoch, shards read, samples read, of a block]]."""


class Shards(Protocol):
    """What is read here: groups of shards, each with its share of the samples."""

    groups: Sequence[Sequence[str]]
    weights: Sequence[float]
    options: ReadOptions
    skipped: Sequence[SkippedSample]

    def read_shard(self, url: str, first: int = 0) -> Iterator[tuple[int, Found]]:
        """Yield number and content of one shard, from number `first` on."""


class StreamingLoader:
    """A `Loader` whose readers each keep a cursor."""

    def __init__(self, source: Shards, prepare: Prepare, config: LoaderConfig) -> None:
        self.source, self.prepare, self.config = source, prepare, config
        self.state: State | None = None

    def state_dict(self) -> State | None:
        if self.state is None:
            return None
        return {**self.state, "cursors": {**self.state["cursors"]}}

    def load_state_dict(self, state: State) -> None:
        cursors = state.get("cursors", state.get("places"))  # the name in earlier checkpoints
        self.state = {"readers": state["readers"], "cursors": cursors}

    def batches(self, start: int = 0) -> Generator[Batch]:
        """Return this rank's batches.

        Raises: ValueError as `read_endless` and `SkipStats` do.
        """
        config = self.config
        if config.rank == 0:
            config.stats.add(0, self.source.skipped)
        readers = split_readers(self.source, config, self.state)
        self.state = {"readers": readers.count, "cursors": readers.cursors}
        stream = run_workers(
            _ReaderBatches(self.source, self.prepare, config, readers, start),
            min(config.num_workers, len(readers.cursors)),
            batch_size=None,
            collate_fn=_unchanged,
        )
        return counted(self._track(stream, self.state["cursors"]), config)

    def _track(
        self, stream: Generator[tuple[int, Cursor, Batch]], cursors: dict[int, Cursor | None]
    ) -> Generator[Batch]:
        """Yield batches, each after its reader's cursor moved behind it."""
        with closing(stream):
            for reader, cursor, batch in stream:
                cursors[reader] = cursor
                yield batch


@dataclass(frozen=True)
class Readers:
    """The readers of one rank, among `count` of all ranks."""

    count: int
    cursors: dict[int, Cursor | None]
    """Where each reader begins, by its number; one reader per worker process."""


def split_readers(source: Shards, config: LoaderConfig, state: State | None) -> Readers:
    """Return the readers of a rank; each shard has one reader where there are enough shards."""
    report: Callable[[str], None] = config.stats.report
    shards, asked = min(map(len, source.groups)), max(1, config.num_workers)
    workers = max(1, min(asked, shards // config.world_size))
    if shards < config.world_size:
        report(
            f"{shards} shards for {config.world_size} processes: each samples shards at random, so "
            "an epoch may read some samples twice and others never"
        )
    elif workers < asked:
        report(f"{shards} shards: {workers} workers a process read them instead of {asked}")
    count = workers * config.world_size
    numbers = range(config.rank * workers, (config.rank + 1) * workers)
    if state is None:
        return Readers(count, dict.fromkeys(numbers))
    if state["readers"] == count and all(number in state["cursors"] for number in numbers):
        return Readers(count, {number: state["cursors"][number] for number in numbers})
    report(
        f"The shards had {state['readers']} readers and now have {count}: resuming at the next "
        "epoch; the rest of this one is skipped"
    )
    met = [cursor for cursor in state["cursors"].values() if cursor]
    epoch = 1 + max(group[0] for _, *groups in met for group in groups)
    fresh = [0, *([epoch, 0, 0, 0] for _ in source.groups)]
    return Readers(count, dict.fromkeys(numbers, fresh))


class _ReaderBatches(IterableDataset):
    """(reader, its cursor after the batch, batch); workers take turns, each with its own reader."""

    def __init__(
        self, source: Shards, prepare: Prepare, config: LoaderConfig, readers: Readers, start: int
    ) -> None:
        self.source, self.prepare, self.readers, self.start = source, prepare, readers, start
        self.size, self.seed = config.rank_batch_size, config.seed

    def __iter__(self) -> Iterator[tuple[int, Cursor, Batch]]:
        worker = get_worker_info()
        # The first batch comes from the first worker, whichever reader's turn it is.
        turn = (self.start + (worker.id if worker else 0)) % len(self.readers.cursors)
        reader, first = [*self.readers.cursors.items()][turn]
        stream = read_endless(self.source, reader, self.readers.count, self.seed, first)
        while True:
            examples: list[Example] = []
            skipped: list[SkippedSample] = []
            shards: list[ShardRead] = []
            while len(examples) < self.size:
                found, cursor = next(stream)
                if isinstance(found, ShardRead):
                    shards.append(found)
                    continue
                if not isinstance(found, SkippedSample):
                    rng = random.Random(f"{self.seed}/{reader}/{cursor}")
                    found = prepare_sample(self.prepare, found, rng)  # type: ignore[assignment]
                if isinstance(found, SkippedSample):
                    skipped.append(found)
                else:
                    examples.append(found)  # type: ignore[arg-type]
                if len(skipped) == MAX_SKIPPED * self.size:
                    raise too_many_skipped(skipped[-1])
            yield reader, cursor, stack(examples, skipped, shards)


def _unchanged(batch: Any) -> Any:
    return batch


def read_endless(
    source: Shards, reader: int, readers: int, seed: int, cursor: Cursor | None = None
) -> Iterator[tuple[Found, Cursor]]:
    """Yield samples for ever, as reader number `reader` of `readers`, each with the cursor after.

    Raises: ValueError where as many shards as there are hold nothing usable, one after another, or
        where too much cannot be read.
    """
    count, *cursors = cursor or [0, *([0, 0, 0, 0] for _ in source.groups)]
    streams = [
        _GroupReader(source, group, reader, readers, f"{seed}/{i}").read(*cursors[i])
        for i, group in enumerate(source.groups)
    ]
    while True:
        i, _ = weighted_round_robin(count, source.weights)
        found, cursors[i] = next(streams[i])
        count += not isinstance(found, SkippedSample | ShardRead)
        yield found, [count, *cursors]


@dataclass(frozen=True)
class _GroupReader:
    """One of several readers of a group of shards."""

    source: Shards
    group: Sequence[str]
    reader: int
    readers: int
    seed: str

    def read(
        self, epoch: int, first: int, offset: int, done: int
    ) -> Iterator[tuple[Found, list[int]]]:
        """Yield samples for ever from sample `offset` of shard `first` on, each with its cursor.

        Args:
            done: samples of the block that begins there which were read already.
        """
        losses = ShardLosses(self.source.options.cleaning.max_bad_fraction)
        shards = len(self.group)
        empty = 0  # shards in a row, about: a reader may have few, and others the good ones
        while True:
            used, last = False, list[SkippedSample]()
            for start, samples, others in self._blocks(epoch, first, offset):
                # Where only part of a block is left, the others were reported before the rest.
                for other in others if done == 0 else ():
                    if isinstance(other, SkippedSample):
                        last = last if last and other.cause in IGNORED else [other]
                    else:  # here, too, since where nothing can be read no batch is ever full
                        losses.add([other])
                    yield other, [epoch, *start, done]
                random.Random(f"{self.seed}/{self.reader}/{epoch}/{start}").shuffle(samples)
                for i, sample in enumerate(samples[done:], done + 1):
                    yield sample, [epoch, *start, i]
                used, done = used or bool(samples), 0
            empty = 0 if used or first or offset else empty + max(1, shards // self.readers)
            if empty >= shards:
                why = f"the last was skipped: {last[0]}" if last else "they are empty"
                raise ValueError(
                    f"no usable sample in {shards} shards, {self.group[0]} the first; {why}"
                )
            epoch, first, offset = epoch + 1, 0, 0

    def _blocks(
        self, epoch: int, first: int, offset: int
    ) -> Iterator[tuple[tuple[int, int], list[Sample], list[SkippedSample | ShardRead]]]:
        """Yield the rest of an epoch in blocks: where each begins, its samples, and the others."""
        order = shards_of_reader(len(self.group), self.reader, self.readers, f"{self.seed}/{epoch}")
        start, samples, others = (first, offset), list[Sample](), list[SkippedSample | ShardRead]()
        skipped = 0
        for number in range(first, len(order)):
            for at, found in self.source.read_shard(self.group[order[number]], offset):
                if isinstance(found, SkippedSample | ShardRead):
                    others.append(found)
                    skipped += isinstance(found, SkippedSample)
                else:
                    samples.append(found)
                if len(samples) == BLOCK or skipped == FEW_SHARDS:
                    yield start, samples, others
                    start, samples, others, skipped = (number, at + 1), [], [], 0
            offset = 0
        if samples or others:
            yield start, samples, others


def shards_of_reader(shards: int, reader: int, readers: int, seed: str) -> list[int]:
    """Return the shards that one of several readers reads in an epoch, in its order.

    Every shard has one reader where there are enough of them; otherwise each reader samples some.
    """
    if shards < readers:
        return random.Random(f"{seed}/{reader}").choices(range(shards), k=shards)
    order = list(range(shards))
    random.Random(seed).shuffle(order)
    return order[reader::readers]
