"""Batches as a pure function of (seed, step): any training can begin anywhere in its data."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dalle1.data.images import TooSmall
from dalle1.data.sources import CaptionSource

Example = Mapping[str, Tensor]
Prepare = Callable[[Any, int, random.Random], Example]
"""(source, index, rng) → the tensors of one example."""

SKIPPED = "skipped"
"""In every example of `batches`: how many pairs were left out before it as too small."""

ATTEMPTS = 1000
"""So many unusable pairs in a row are no accident."""

ENDLESS = 1 << 30
"""From this length on a source has fresh pairs for ever: read in order, shuffled by nature."""


class _Prepared(Dataset):
    """A source whose examples are made by `prepare`, with randomness from (seed, place)."""

    def __init__(self, source: CaptionSource, prepare: Prepare, seed: int) -> None:
        self.source, self.prepare, self.seed = source, prepare, seed

    def __getitem__(self, place: int) -> Example:
        index, rng = (
            index_at(place, len(self.source), self.seed),
            random.Random(f"{self.seed}/{place}"),
        )
        for skipped in range(ATTEMPTS):
            try:
                example = self.prepare(self.source, index, rng)
                return {**example, SKIPPED: torch.tensor(skipped)}
            except TooSmall as error:
                reason = error
                index = rng.randrange(len(self.source))
        raise ValueError(f"{ATTEMPTS} pictures in a row were left out, the last because: {reason}")


class _Listed(Dataset):
    """A source whose examples are made by `prepare`, by index."""

    def __init__(self, source: CaptionSource, prepare: Prepare) -> None:
        self.source, self.prepare = source, prepare

    def __getitem__(self, index: int) -> Example:
        return self.prepare(self.source, index, random.Random(index))


class _Places(Sampler[list[int]]):
    """The places of a rank's part of each batch in the stream, from step `start` on, for ever."""

    def __init__(self, batch_size: int, start: int, rank: int, world_size: int) -> None:
        self.batch_size, self.start = batch_size, start
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start
        while True:
            first = step * self.batch_size + self.offset
            yield list(range(first, first + self.share))
            step += 1


def index_at(place: int, length: int, seed: int) -> int:
    """Give the pair at a place of the endless stream: each epoch is a permutation of its own."""
    if length >= ENDLESS:
        return place % length
    epoch, position = divmod(place, length)
    return int(_order(length, seed, epoch)[position])


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=generator)


def batches(
    source: CaptionSource,
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int = 0,
    start: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[dict[str, Tensor]]:
    """Yield batches for ever, from step `start` on, the same for any number of workers.

    Of `world_size` processes each takes its share, in order of rank.

    A pair whose picture is too small (`TooSmall`) is left out and another one taken, at random;
    the batch says under `SKIPPED` how many were.
    """
    loader: DataLoader = DataLoader(
        _Prepared(source, prepare, seed),
        batch_sampler=_Places(batch_size, start, rank, world_size),
        num_workers=num_workers,
        worker_init_fn=_quiet_worker,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
    yield from _run(loader)


def in_order(
    source: CaptionSource,
    prepare: Prepare,
    indices: Sequence[int],
    batch_size: int,
    num_workers: int = 0,
) -> Generator[dict[str, Tensor]]:
    """Yield the examples at `indices` once each, in batches of at most `batch_size`."""
    examples = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    loader: DataLoader = DataLoader(
        _Listed(source, prepare),
        batch_sampler=examples,  # type: ignore[arg-type]
        num_workers=num_workers,
        worker_init_fn=_quiet_worker,
    )
    yield from _run(loader)


def first_examples(source: CaptionSource, prepare: Prepare, count: int) -> dict[str, Tensor]:
    """Stack the first `count` examples, or as many as there are, leaving out what is `TooSmall`."""
    found: list[Example] = []
    reason = TooSmall("there is nothing to validate on")
    for index in range(len(source)):
        try:
            found.append(prepare(source, index, random.Random(index)))
        except TooSmall as error:
            reason = error
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"nothing to validate on is usable; the last was not because: {reason}")
    return {name: torch.stack([example[name] for example in found]) for name in found[0]}


def _run(loader: DataLoader) -> Generator[dict[str, Tensor]]:
    """Yield what `loader` loads; its workers end with this, even where an error ends it."""
    stream = iter(loader)
    try:
        yield from stream
    finally:
        if loader.num_workers:
            # By itself it waits until nobody refers to it any more, which an error's traceback
            # does to the last: the process would hang on workers that take no signal.
            stream._shutdown_workers()  # type: ignore[attr-defined]


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    # The main process decides what a signal means, and ends its workers when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
