"""Several indexed sources as one: one after another, or by weights."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, chain

from dalle1.data.sources.base import ENDLESS, names_digest
from dalle1.data.sources.indexed import IndexedSample, IndexedSource


class Mixture(IndexedSource):
    """Several sources as one.

    Args:
        weights: positive shares of what is read; None takes every sample of all equally often.
    """

    def __init__(
        self, sources: Sequence[IndexedSource], weights: Sequence[float] | None = None
    ) -> None:
        if weights is None and any(len(source) >= ENDLESS for source in sources):
            raise ValueError("one of the sources is endless; add weights, as in toybox::1,b::2")
        self.sources, self.weights, self.weighted = sources, weights, weights is not None
        self.ends = list(accumulate(len(source) for source in sources))
        self.skipped = list(chain.from_iterable(source.skipped for source in sources))
        self.notes = list(chain.from_iterable(source.notes for source in sources))
        self.shards_read = list(chain.from_iterable(source.shards_read for source in sources))

    def __len__(self) -> int:
        return self.ends[-1]

    def find(self, index: int) -> IndexedSample:
        i = bisect_right(self.ends, index)
        sample = self.sources[i].find(index - self.ends[i] + len(self.sources[i]))
        return replace(sample, number=index)

    def index_at(self, position: int, seed: int) -> int:
        if self.weights is None:
            return super().index_at(position, seed)
        i, count = weighted_round_robin(position, self.weights)
        return self.ends[i] - len(self.sources[i]) + self.sources[i].index_at(count, seed)

    def random_index(self, rng: random.Random) -> int:
        """Return the index of any sample; each source is taken by its weight."""
        if self.weights is None:
            return rng.randrange(len(self))
        (i,) = rng.choices(range(len(self.sources)), self.weights)
        return self.ends[i] - 1 - rng.randrange(len(self.sources[i]))

    def digest(self) -> str:
        return names_digest([str(self.weights), *(source.digest() for source in self.sources)])

    def once(self) -> Iterator[IndexedSample]:
        """Yield as many samples as there are, of each source its share."""
        return (self.find(self.index_at(position, 0)) for position in range(len(self)))


def weighted_round_robin(position: int, weights: Sequence[float]) -> tuple[int, int]:
    """Return which of several sources is read at a position, and how often it was before.

    The positions of each are spread evenly: after n of them, each source had its share of n, within
    1 (within k - 1 for k sources).
    """
    for i in range(len(weights) - 1):
        share = _share_of_first(tuple(weights[i:]))
        before, after = (n * share.numerator // share.denominator for n in (position, position + 1))
        if after > before:
            return i, before
        position -= before
    return len(weights) - 1, position


@lru_cache(maxsize=64)
def _share_of_first(weights: tuple[float, ...]) -> Fraction:
    exact = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    return exact[0] / sum(exact)
