"""What a source of pairs is, in which order it is read, and how several become one."""

from __future__ import annotations

import os
import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from dalle1.data.skipped import SkippedSample

ENDLESS = 1 << 30
"""From this length on a source has fresh pairs for ever: read in order, shuffled by nature."""


class CaptionSource(Protocol):
    """Captions of something, by index."""

    def __len__(self) -> int: ...

    def caption(self, index: int, rng: random.Random) -> str:
        """Give a caption of pair `index`, one of several at random where there are several."""


class PairSource(CaptionSource, Protocol):
    """What a training reads from: captions and their pictures.

    Raises: BadSample from either, where a pair is damaged or not wanted.
    """

    def image(self, index: int) -> Image.Image:
        """Give the picture of pair `index`, in RGB."""


Items = TypeVar("Items", list[Any], range)


def part(items: Items, split: str) -> Items:
    """Give the training part of a user's data, or its end, at most 512 pairs, to validate on."""
    held = min(512, len(items) // 20)
    if split == "encode":
        return items
    if split == "train" or held == 0:  # too few to spare any
        return items[: len(items) - held]
    return items[len(items) - held :]


def name_of(source: CaptionSource, index: int) -> str:
    """Say where a pair is, for people."""
    name = getattr(source, "name", None)
    return name(index) if name else f"pair {index}"


def left_out_of(source: CaptionSource) -> list[SkippedSample]:
    """Give what a source left out when it was opened."""
    return getattr(source, "left_out", [])


def index_at(position: int, length: int, seed: int) -> int:
    """Give the pair at a position of the endless stream: each epoch is a permutation of its own."""
    if length >= ENDLESS:
        return position % length
    epoch, within = divmod(position, length)
    return int(_order(length, seed, epoch)[within])


@lru_cache(maxsize=8)
def _order(length: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=generator)


def turn(position: int, weights: Sequence[float]) -> tuple[int, int]:
    """Say which of several sources has its turn at a position, and how many turns it had before.

    Turns are spread evenly: after n positions, each source had its share of n, within 1 (within
    k − 1 for k sources).
    """
    for i in range(len(weights) - 1):
        own = _fraction(tuple(weights[i:]))
        before, after = (n * own.numerator // own.denominator for n in (position, position + 1))
        if after > before:
            return i, before
        position -= before
    return len(weights) - 1, position


@lru_cache(maxsize=64)
def _fraction(weights: tuple[float, ...]) -> Fraction:
    exact = [Fraction(weight).limit_denominator(10**6) for weight in weights]
    return exact[0] / sum(exact)


class Mixture:
    """Several sources as one: one after another, or each with its share of what is read.

    Args:
        weights: their shares, as positive numbers; None takes every pair of all equally often.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        self.sources, self.weights = sources, weights
        if weights is None and any(len(source) >= ENDLESS for source in sources):
            raise ValueError("one of the sources has no end; give weights, as in toybox::1,b::2")
        self.ends = list(accumulate(len(source) for source in sources))
        self.left_out = list(chain.from_iterable(left_out_of(source) for source in sources))
        read = (getattr(source, "shards_read", ()) for source in sources)
        self.shards_read = list(chain.from_iterable(read))

    def __len__(self) -> int:
        return self.ends[-1]

    def index_at(self, position: int, seed: int) -> int:
        """Give the pair at a position of the endless stream."""
        if self.weights is None:
            return index_at(position, len(self), seed)
        i, count = turn(position, self.weights)
        return self.ends[i] - len(self.sources[i]) + index_at(count, len(self.sources[i]), seed)

    def draw(self, rng: random.Random) -> int:
        """Give any pair, by the sources' shares."""
        if self.weights is None:
            return rng.randrange(len(self))
        (i,) = rng.choices(range(len(self.sources)), self.weights)
        return self.ends[i] - 1 - rng.randrange(len(self.sources[i]))

    def _find(self, index: int) -> tuple[Any, int]:
        i = bisect_right(self.ends, index)
        return self.sources[i], index - self.ends[i] + len(self.sources[i])

    def caption(self, index: int, rng: random.Random) -> str:
        source, index = self._find(index)
        return source.caption(index, rng)

    def image(self, index: int) -> Image.Image:
        source, index = self._find(index)
        return source.image(index)

    def name(self, index: int) -> str:
        return name_of(*self._find(index))


def pair_at(source: CaptionSource, position: int, seed: int) -> int:
    """Give the index of the pair at a position of the endless stream of a source."""
    if isinstance(source, Mixture):
        return source.index_at(position, seed)
    return index_at(position, len(source), seed)


def any_pair(source: CaptionSource, rng: random.Random) -> int:
    """Give the index of any pair of a source, to stand in for an unusable one."""
    return source.draw(rng) if isinstance(source, Mixture) else rng.randrange(len(source))


def split_sources(data: str) -> tuple[list[str], list[float] | None]:
    """Cut `a::2,b::1` into names and weights.

    Commas within braces are a pattern's, and what is within quotes in a pipe's command is its own:
    `pipe:cat 'a,b.tar'`. What is there under the whole name is one source.

    Raises: ValueError where only some have a weight, one is no positive number, or a quote is open.
    """
    if os.path.exists(data):
        return [data], None
    names, weights = [], []
    for word in _at_commas(data):
        name, weight = word, None
        if found := re.fullmatch(r"(.*)::([^:/'\"]*)", word, re.DOTALL):
            name, weight = found.groups()
        names.append(name)
        weights.append(weight)
    if all(weight is None for weight in weights):
        return names, None
    try:
        numbers = [float(weight) for weight in weights if weight is not None]
        whole = len(numbers) == len(names) and all(1e-6 <= n <= 1e6 for n in numbers)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"data is {data!r}, expected a weight for each source, as in a::2,b::1")
    return names, numbers


def _at_commas(data: str) -> Iterable[str]:
    depth, begin, quote = 0, 0, ""
    for i, letter in enumerate(data):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and data.startswith("pipe:", begin):
            quote = letter
        else:
            depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0 and not quote:
            yield data[begin:i]
            begin = i + 1
    if quote:
        raise ValueError(f"data is {data!r}: the quote {quote} is never closed")
    yield data[begin:]
