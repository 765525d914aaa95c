"""Batches as a pure function of (seed, step): any training can begin anywhere in its data.

Sources with an index have that for nothing. Shards that are read front to back cannot be entered
anywhere: there, each batch says its place, which is kept in the checkpoint and gone on from.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    default_collate,
    get_worker_info,
)

from dalle1.console import worker_advice, worker_killed
from dalle1.data.skipped import BadSample, ShardRead, SkippedSample, SkipStats
from dalle1.data.sources.base import CaptionSource, Mixture, any_pair, left_out_of, name_of, pair_at
from dalle1.data.sources.streaming_shards import Found, Pair, StreamingShards

Source = CaptionSource | StreamingShards
Example = Mapping[str, Tensor]
Prepare = Callable[[Any, int, random.Random], Example]
"""(source, index, rng) → the tensors of one example; BadSample where there is none."""
Batch = dict[str, Any]
"""Tensors by name; and under `LEFT_OUT` and `PLACE`, what is no tensor."""

LEFT_OUT = "left out"
"""In every batch: what was left out in making it, a list of `SkippedSample`."""

SHARDS = "shards"
"""In batches of streamed shards: those that came to their end in it, a list of `ShardRead`."""

PLACE = "place"
"""In batches of streamed shards: what `batches` goes on from, made of dicts, lists and numbers."""

ATTEMPTS = 1000
"""So many unusable pairs in a row are no accident."""


@dataclass(frozen=True)
class Readers:
    """How streamed shards are split: among `count` readers, of which a rank has some."""

    count: int
    places: dict[int, Any]
    """Of the rank's readers, by number, where each begins; one a worker process."""


class _Prepared(Dataset):
    """A source whose examples are made by `prepare`, with randomness from (seed, position)."""

    def __init__(self, source: CaptionSource, prepare: Prepare, seed: int) -> None:
        self.source, self.prepare, self.seed = source, prepare, seed

    def __getitem__(self, position: int) -> Batch:
        index = pair_at(self.source, position, self.seed)
        rng = random.Random(f"{self.seed}/{position}")
        left_out: list[SkippedSample] = []
        while len(left_out) < ATTEMPTS:
            try:
                return {**self.prepare(self.source, index, rng), LEFT_OUT: left_out}
            except BadSample as error:
                left_out.append(_left_out(error, self.source, index))
                index = any_pair(self.source, rng)
        raise _hopeless(left_out[-1])


class _Listed(Dataset):
    """A source whose examples are made by `prepare`, by index; unusable ones are only named."""

    def __init__(self, source: CaptionSource, prepare: Prepare) -> None:
        self.source, self.prepare = source, prepare

    def __getitem__(self, index: int) -> Batch:
        try:
            return {**self.prepare(self.source, index, random.Random(index)), LEFT_OUT: []}
        except BadSample as error:
            return {LEFT_OUT: [_left_out(error, self.source, index)]}


class _Streaming(IterableDataset):
    """Batches of streamed shards; worker processes take turns, each with a reader of its own."""

    def __init__(
        self,
        source: StreamingShards,
        prepare: Prepare,
        seed: int,
        size: int,
        readers: Readers,
        start: int,
    ) -> None:
        self.source, self.prepare, self.seed, self.size = source, prepare, seed, size
        self.readers, self.start = readers, start

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        # The first batch comes of the first worker, whichever reader's turn it is.
        turn = (self.start + (worker.id if worker else 0)) % len(self.readers.places)
        reader = [*self.readers.places][turn]
        place = self.readers.places[reader]
        pairs = self.source.read(reader, self.readers.count, self.seed, place)
        while True:
            examples: list[Batch] = []
            left_out: list[SkippedSample] = []
            shards: list[ShardRead] = []
            while len(examples) < self.size:
                pair, place = next(pairs)
                if isinstance(pair, ShardRead):
                    shards.append(pair)
                    continue
                try:
                    examples.append(self._example(pair, f"{self.seed}/{reader}/{place}"))
                except BadSample as error:
                    left_out.append(SkippedSample.because(error, pair.where))
                if len(left_out) == ATTEMPTS * self.size:
                    raise _hopeless(left_out[-1])
            told = {LEFT_OUT: left_out, SHARDS: shards, PLACE: (reader, place)}
            yield {**_stack(examples), **told}

    def _example(self, pair: Pair | SkippedSample, seed: str) -> Batch:
        if isinstance(pair, SkippedSample):
            raise BadSample(pair.cause, pair.why, pair.where)
        return {**self.prepare(pair, 0, random.Random(seed)), LEFT_OUT: []}


class _Positions(Sampler[list[int]]):
    """The positions of one rank's share of each batch in the stream, from step `start` on."""

    def __init__(self, batch_size: int, start: int, rank: int, share: int) -> None:
        self.batch_size, self.start, self.rank, self.share = batch_size, start, rank, share

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start * self.batch_size + self.rank * self.share
        while True:
            yield list(range(first, first + self.share))
            first += self.batch_size


def batches(
    source: Source,
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int = 0,
    start: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    place: Mapping[str, Any] | None = None,
    tally: SkipStats | None = None,
) -> Generator[Batch]:
    """Yield a rank's share of each batch for ever, from step `start` on.

    With an index, the shares of all ranks together are the batch that one process would have, the
    same for any number of workers. Streamed shards are split over ranks and workers.

    A pair that is unusable is left out, named under `LEFT_OUT`, and another one taken. The first
    batch of all names what was left out on opening the source, too.

    Args:
        batch_size: pairs a step of all ranks together.
        place: what the last batch of this rank before `start` had under `PLACE`.
        tally: counts what is left out, and stops where too much is damaged.

    Raises: ValueError where the ranks cannot share a batch, or as `tally` does.
    """
    if batch_size % world_size:
        raise ValueError(
            f"batch_size is {batch_size}, expected a multiple of the {world_size} processes"
        )
    share = batch_size // world_size
    tally = tally or SkipStats(1.0)
    opening: list[SkippedSample] = []
    if isinstance(source, StreamingShards):
        readers = split_readers(source, num_workers, rank, world_size, place, tally.say)
        loaded = _run(
            _Streaming(source, prepare, seed, share, readers, start),
            min(num_workers, len(readers.places)),
            batch_size=None,
            collate_fn=_as_it_is,
        )
        stream = _with_places(loaded, readers)
    else:
        if rank == 0:  # every rank opened the same
            tally.open(len(source), left_out_of(source))
            opening = left_out_of(source) if start == 0 else []
        stream = _run(
            _Prepared(source, prepare, seed),
            num_workers,
            batch_sampler=_Positions(batch_size, start, rank, share),
            collate_fn=_stack,
        )
    with closing(stream):
        for batch in stream:
            tally.add(share, batch[LEFT_OUT], batch.pop(SHARDS, ()))
            batch[LEFT_OUT] += opening
            opening = []
            yield batch


def split_readers(
    source: StreamingShards,
    num_workers: int,
    rank: int,
    world_size: int,
    place: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> Readers:
    """Give the readers of a rank, so that each shard has one reader where there are enough."""
    shards, asked = source.smallest(), max(1, num_workers)
    workers = max(1, min(asked, shards // world_size))
    if shards < world_size:
        say(
            f"{shards} shards for {world_size} processes: each draws shards at random, so an epoch "
            "may hold some pairs twice and others never"
        )
    elif workers < asked:
        say(f"{shards} shards: {workers} workers a process read them instead of {asked}")
    count, numbers = workers * world_size, range(rank * workers, (rank + 1) * workers)
    if place is None:
        return Readers(count, dict.fromkeys(numbers))
    if place["readers"] == count and all(number in place["places"] for number in numbers):
        return Readers(count, {number: place["places"][number] for number in numbers})
    say(
        f"The shards had {place['readers']} readers and now have {count}: going on with the next "
        "epoch; the rest of this one is left out"
    )
    met = [at for at in place["places"].values() if at]
    epoch = 1 + max(group[0] for _, *groups in met for group in groups)
    fresh = [0, *([epoch, 0, 0, 0] for _ in source.groups)]
    return Readers(count, dict.fromkeys(numbers, fresh))


def join_places(places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make one place of those of all ranks: what a checkpoint keeps, for every rank."""
    every = {number: at for place in places for number, at in place["places"].items()}
    return {"readers": places[0]["readers"], "places": every}


def _with_places(stream: Generator[Batch], readers: Readers) -> Generator[Batch]:
    """Give with each batch the places of all readers after it."""
    places = {**readers.places}
    with closing(stream):
        for batch in stream:
            reader, place = batch[PLACE]
            places[reader] = place
            yield {**batch, PLACE: {"readers": readers.count, "places": {**places}}}


def in_order(
    source: CaptionSource,
    prepare: Prepare,
    indices: Sequence[int],
    batch_size: int,
    num_workers: int = 0,
) -> Generator[Batch]:
    """Yield the examples at `indices` once each, in batches of at most `batch_size`.

    Batches are smaller, or hold nothing but `LEFT_OUT`, where pairs are unusable.
    """
    examples = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    listed = _Listed(source, prepare)
    yield from _run(listed, num_workers, batch_sampler=examples, collate_fn=_stack)


class _Found(Dataset):
    """What is found in shards, as examples, each pair's with its number under `index`."""

    def __init__(self, prepare: Prepare) -> None:
        self.prepare = prepare

    def __getitem__(self, numbered: tuple[int, Found]) -> Batch:
        number, found = numbered
        if isinstance(found, ShardRead):
            return {LEFT_OUT: [], SHARDS: [found]}
        if isinstance(found, SkippedSample):
            return {LEFT_OUT: [found]}
        example = _Listed(found, self.prepare)[0]
        return {**example, "index": number} if len(example) > 1 else example


def of_shards(
    source: StreamingShards,
    urls: Iterable[str],
    prepare: Prepare,
    batch_size: int,
    num_workers: int = 0,
) -> Generator[Batch]:
    """Yield the examples of shards once each, as `in_order` does; the workers decode them."""
    found = (numbered for url in urls for numbered in source.shard(url))
    groups = iter(lambda: [*islice(found, batch_size)], [])
    yield from _run(_Found(prepare), num_workers, batch_sampler=groups, collate_fn=_stack)


def usable(
    source: Source,
    prepare: Prepare,
    split: str = "train",
    left_out: list[SkippedSample] | None = None,
) -> Iterator[Example]:
    """Yield examples in a fixed order, each once; `left_out` takes in the others."""
    if isinstance(source, StreamingShards):
        pairs: Iterable[Any] = source.held_out() if split == "validation" else source.once()
        found = ((pair, 0) for pair in pairs)
    elif isinstance(source, Mixture):  # of each its share
        found = ((source, source.index_at(position, 0)) for position in range(len(source)))
    else:
        found = ((source, index) for index in range(len(source)))
    for number, (pair, index) in enumerate(found):
        try:
            if isinstance(pair, SkippedSample):
                raise BadSample(pair.cause, pair.why, pair.where)
            yield prepare(pair, index, random.Random(number))
        except BadSample as error:
            if left_out is not None:
                left_out.append(_left_out(error, pair, index))


def first_examples(source: Source, prepare: Prepare, count: int) -> dict[str, Tensor]:
    """Stack the first `count` usable examples to validate on, or as many as there are."""
    left_out: list[SkippedSample] = []
    found = list(islice(usable(source, prepare, "validation", left_out), count))
    if not found:
        last = f"{left_out[-1].where}: {left_out[-1].why}" if left_out else "there is nothing"
        raise ValueError(f"nothing to validate on is usable; the last was not because: {last}")
    if left_out:
        first = f"{left_out[0].where} ({left_out[0].cause}: {left_out[0].why})"
        print(f"Validating on {len(found)} pairs; left out {len(left_out)}, first {first}")
    return {name: torch.stack([example[name] for example in found]) for name in found[0]}


def first_captions(source: Source, count: int) -> list[str]:
    """Give a caption of each of the first `count` usable pairs, to learn a vocabulary from."""
    if isinstance(source, StreamingShards):
        source = source.without_pictures()
    captions: Iterator[Any] = usable(source, _caption_of)
    return list(islice(captions, count))


def _caption_of(source: CaptionSource, index: int, rng: random.Random) -> Any:
    return source.caption(index, rng)


def _left_out(error: BadSample, source: CaptionSource, index: int) -> SkippedSample:
    """Name a pair only where the error does not: to look its name up may be another reading."""
    return SkippedSample.because(error, error.where or name_of(source, index))


def _hopeless(last: SkippedSample) -> ValueError:
    return ValueError(
        f"{ATTEMPTS} pairs in a row were left out, the last, {last.where}, because: {last.why}"
    )


def _stack(examples: Sequence[Batch]) -> Batch:
    told = {name: [x for e in examples for x in e.get(name, ())] for name in (LEFT_OUT, SHARDS)}
    tensors = [{name: e[name] for name in e if name not in told} for e in examples]
    tensors = [example for example in tensors if example]
    return {**(default_collate(tensors) if tensors else {}), **told}


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _run(data: Dataset, num_workers: int, **options: Any) -> Generator[Batch]:
    """Yield what is loaded of `data`; its workers end with this, even where an error ends it."""
    loader: DataLoader = DataLoader(
        data,
        num_workers=num_workers,
        worker_init_fn=_quiet_worker,
        pin_memory=torch.cuda.is_available(),
        **options,
    )
    stream = iter(loader)
    try:
        with worker_advice():
            yield from stream
    except (ConnectionError, EOFError) as error:
        if str(error).startswith("Caught"):  # in a worker, which is alive
            raise
        raise worker_killed(error) from error  # what it was handing over is cut off
    finally:
        if num_workers:
            # By itself it waits until nobody refers to it any more, which an error's traceback
            # does to the last: the process would hang on workers that take no signal.
            stream._shutdown_workers()  # type: ignore[attr-defined]


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    # The main process decides what a signal means, and ends its workers when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
