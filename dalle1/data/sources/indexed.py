"""What all sources with an index share: samples by number, shuffled anew in every epoch."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

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
from dalle1.data.skipped import IGNORED, ShardRead, SkippedSample
from dalle1.data.sources.base import ENDLESS, names_digest


@dataclass(frozen=True)
class IndexedSample:
    """Sample `index` of a source; `number` is its position in the mixture that it is part of."""

    source: Any
    index: int
    number: int

    @property
    def name(self) -> str:
        return self.source.name(self.index)

    @property
    def key(self) -> str:
        return str(self.number)

    def caption(self, rng: random.Random) -> str:
        return self.source.caption(self.index, rng)

    def image(self) -> Image.Image:
        return self.source.image(self.index)


class IndexedSource(ABC):
    """A `Source` whose samples have numbers.

    A subclass has `__len__`, `caption(index, rng)` and `image(index)`, or its own `find`.
    """

    skipped: Sequence[SkippedSample] = ()
    shards_read: Sequence[ShardRead] = ()
    notes: Sequence[str] = ()
    weighted = False
    _shuffled: tuple[tuple[int, int], Tensor] | None = None
    """Seed and epoch, and the permutation, that were read last."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def size(self) -> int:
        return len(self)

    def name(self, index: int) -> str:
        """Return where sample `index` is, for people."""
        return f"sample {index}"

    def find(self, index: int) -> IndexedSample:
        """Return sample `index`."""
        return IndexedSample(self, index, index)

    def index_at(self, position: int, seed: int) -> int:
        """Return the index at a position of the endless stream: each epoch has a permutation."""
        length = len(self)
        if length >= ENDLESS:
            return position % length
        epoch, within = divmod(position, length)
        if self._shuffled is None or self._shuffled[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self._shuffled = (seed, epoch), torch.randperm(length, generator=generator)
        return int(self._shuffled[1][within])

    def random_index(self, rng: random.Random) -> int:
        """Return the index of any sample, to replace a skipped one."""
        return rng.randrange(len(self))

    def once(self) -> Iterator[IndexedSample]:
        return map(self.find, range(len(self)))

    def captions_only(self) -> IndexedSource:
        return self

    def chunks(self, size: int) -> Iterator[range]:
        return (range(b, min(b + size, len(self))) for b in range(0, len(self), size))

    def digest(self) -> str:
        return names_digest([type(self).__name__, str(len(self))])

    def loader(self, prepare: Prepare, config: LoaderConfig) -> IndexedLoader:
        return IndexedLoader(self, prepare, config)


@dataclass(frozen=True)
class IndexedLoader:
    """A `Loader` whose batches follow from (seed, step), the same for any number of workers.

    The shares of all ranks together are the batch that one process would have. Where a sample is
    skipped, another one is taken.
    """

    source: IndexedSource
    prepare: Prepare
    config: LoaderConfig

    def batches(self, start: int = 0) -> Generator[Batch]:
        """Return this rank's batches; the first of a training has what opening skipped, too.

        Raises: ValueError as `SkipStats` does.
        """
        config, opening = self.config, self.source.skipped
        if config.rank == 0:  # every rank opened the same
            config.stats.open(len(self.source), opening, self.source.notes)
        stream = run_workers(
            _AtPositions(self.source, self.prepare, config.seed),
            config.num_workers,
            batch_sampler=_Positions(config, start),
            collate_fn=_stack_with_skipped,
        )
        damaged = [sample for sample in opening if sample.cause not in IGNORED]
        return counted(stream, config, damaged if config.rank == start == 0 else ())

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: State) -> None:
        """Ignore the cursor of a stream; the step alone tells where to continue."""


class _AtPositions(Dataset):
    """Examples at positions of the endless stream, with randomness from (seed, position)."""

    def __init__(self, source: IndexedSource, prepare: Prepare, seed: int) -> None:
        self.source, self.prepare, self.seed = source, prepare, seed

    def __getitem__(self, position: int) -> tuple[Example, list[SkippedSample]]:
        index = self.source.index_at(position, self.seed)
        rng = random.Random(f"{self.seed}/{position}")
        skipped: list[SkippedSample] = []
        while len(skipped) < MAX_SKIPPED:
            example = prepare_sample(self.prepare, self.source.find(index), rng)
            if not isinstance(example, SkippedSample):
                return example, skipped
            skipped.append(example)
            index = self.source.random_index(rng)
        raise too_many_skipped(skipped[-1])


class _Positions(Sampler[range]):
    """The positions of one rank's share of each batch, from step `start` on."""

    def __init__(self, config: LoaderConfig, start: int) -> None:
        self.config, self.start = config, start

    def __iter__(self) -> Iterator[range]:
        share = self.config.rank_batch_size
        first = self.start * self.config.batch_size + self.config.rank * share
        while True:
            yield range(first, first + share)
            first += self.config.batch_size


def _stack_with_skipped(pairs: Sequence[tuple[Example, list[SkippedSample]]]) -> Batch:
    return stack([example for example, _ in pairs], [x for _, skipped in pairs for x in skipped])
