"""N-grams with interpolated Kneser–Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1999).

    P(w | h) = (c(h, w) − D)₊ / c(h) + D · types(h) / c(h) · P(w | h′)

h′ is the context h without its farthest token; D = n₁ / (n₁ + 2n₂) of the counts that are 1 and 2.
In lower orders, c counts the different farthest tokens instead of occurrences; order 0 is uniform.

M tokens, K tokens of context, nearest first, V vocabulary; token V stands for what lies outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Contexts = Callable[[np.ndarray], np.ndarray]
"""Grids [B, W, W] → the contexts of their codes [B, W, W, K]."""

NEIGHBOURS = ((0, -1), (-1, 0), (-1, -1), (-1, 1))
"""Rows and columns from a code to its 2-D context: left, above, above left, above right."""


class Level(NamedTuple):
    """Counts of one order: sorted keys of (context, token), and of contexts."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    types: np.ndarray
    discount: float


class NGram:
    """Probabilities of tokens by counts of them and of the tokens before."""

    def __init__(self, tokens: np.ndarray, contexts: np.ndarray, vocabulary: int) -> None:
        """Count tokens [M] after contexts [M, K].

        Raises: ValueError where K + 1 exceeds `max_order`.
        """
        self.vocabulary, self.radix = vocabulary, vocabulary + 1
        order = contexts.shape[1] + 1
        if order > max_order(vocabulary):
            most = max_order(vocabulary)
            raise ValueError(f"order is {order}, expected at most {most} for {vocabulary} tokens")
        keys, counts = np.unique(self._keys(tokens, contexts), return_counts=True)
        levels = [self._level(keys, counts)]
        for length in range(order - 1, 0, -1):
            keys, counts = np.unique(keys % self.radix**length, return_counts=True)
            levels.append(self._level(keys, counts))
        self.levels = levels[::-1]

    @property
    def parameters(self) -> int:
        """Number of counts that are stored."""
        return sum(len(level.keys) for level in self.levels)

    def probabilities(self, tokens: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """Return P of tokens [M] after contexts [M, K]: [M]."""
        keys = self._keys(tokens, contexts)
        p = np.full(len(tokens), 1 / self.vocabulary)
        for length, level in enumerate(self.levels, 1):
            own = keys % self.radix**length
            index, seen = _find(level.contexts, own // self.radix)
            total = np.where(seen, level.totals[index], 1)
            backoff = np.where(seen, level.discount * level.types[index] / total, 1.0)
            index, seen = _find(level.keys, own)
            count = np.where(seen, level.counts[index] - level.discount, 0.0)
            p = count / total + backoff * p
        return p

    def distributions(self, contexts: np.ndarray) -> np.ndarray:
        """Return P of every token after contexts [B, K]: [B, V]."""
        rows = np.repeat(contexts, self.vocabulary, axis=0)
        tokens = np.tile(np.arange(self.vocabulary), len(contexts))
        return self.probabilities(tokens, rows).reshape(len(contexts), -1)

    def _keys(self, tokens: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """Return tokens and contexts as one number; its digits are the token, then the nearest."""
        powers = self.radix ** np.arange(1, contexts.shape[1] + 1, dtype=np.int64)
        return tokens.astype(np.int64) + contexts.astype(np.int64) @ powers

    def _level(self, keys: np.ndarray, counts: np.ndarray) -> Level:
        contexts, first, types = np.unique(
            keys // self.radix, return_index=True, return_counts=True
        )
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once and twice else 0.5
        totals = np.add.reduceat(counts, first)
        return Level(keys, counts, contexts, totals, types, discount)


def max_order(vocabulary: int) -> int:
    """Return the longest n-grams whose keys fit in 63 bits."""
    order = 1
    while (vocabulary + 1) ** (order + 1) < 1 << 63:
        order += 1
    return order


def _find(sorted_keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of each wanted key, and whether it is there."""
    index = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return index, sorted_keys[index] == wanted


def preceding(sequences: np.ndarray, length: int, outside: int) -> np.ndarray:
    """Return the `length` tokens before each of sequences [B, T], nearest first: [B, T, length]."""
    padded = np.pad(sequences, ((0, 0), (length, 0)), constant_values=outside)
    steps = range(length - 1, -1, -1)
    parts = [padded[:, step : step + sequences.shape[1]] for step in steps]
    return np.stack(parts, -1) if parts else np.zeros((*sequences.shape, 0), sequences.dtype)


def raster_contexts(length: int, outside: int) -> Contexts:
    """Return contexts of the codes before, row after row, as in a text."""

    def contexts(grids: np.ndarray) -> np.ndarray:
        flat = preceding(grids.reshape(len(grids), -1), length, outside)
        return flat.reshape(*grids.shape, length)

    return contexts


def neighbour_contexts(length: int, outside: int) -> Contexts:
    """Return contexts of the nearest codes in two dimensions, the first of NEIGHBOURS."""

    def contexts(grids: np.ndarray) -> np.ndarray:
        side = grids.shape[1]
        padded = np.pad(grids, ((0, 0), (1, 0), (1, 1)), constant_values=outside)
        parts = [
            padded[:, 1 + row : 1 + row + side, 1 + column : 1 + column + side]
            for row, column in NEIGHBOURS[:length]
        ]
        return np.stack(parts, -1) if parts else np.zeros((*grids.shape, 0), grids.dtype)

    return contexts


def sample_grids(
    model: NGram, contexts: Contexts, count: int, grid_size: int, seed: int
) -> np.ndarray:
    """Sample grids, one code after another: [count, W, W]."""
    rng = np.random.default_rng(seed)
    grids = np.zeros((count, grid_size, grid_size), dtype=np.int64)
    for row in range(grid_size):
        for column in range(grid_size):
            cumulative = model.distributions(contexts(grids)[:, row, column]).cumsum(-1)
            target = rng.random((count, 1)) * cumulative[:, -1:]
            grids[:, row, column] = (cumulative <= target).sum(-1)
    return grids
