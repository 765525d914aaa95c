"""Probabilities as integers that every machine computes alike.

An entropy decoder must have exactly the encoder's probabilities. Logits come in fp64 and are
rounded to a grid of 1/64 nat, far coarser than the differences between machines; from there on all
arithmetic is on integers. Where a logit is so close to a boundary of this rounding that a machine
may round it to the other side, the encoder shifts the grid of that token, and transmits the shift.

B distributions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache

import numpy as np
from torch import Tensor

TOTAL = 1 << 24
"""Sum of the frequencies of a distribution; each of them is at least 1."""
MAX_VOCABULARY = TOTAL >> 4
STEPS_PER_NAT = 64
WEIGHT_BITS = 30
MARGIN = 1e-9 * STEPS_PER_NAT
"""Distance from a boundary, in steps, that no machine crosses: 1e-9 nats."""
SHIFT, SHIFTS = 0.06, 16
"""Unit of the shifts, in steps, and their number, 0 included."""


@lru_cache
def exponential_table() -> np.ndarray:
    """Return round(2³⁰ · exp(−i/64)) for i = 0, 1 …, until it is 0.

    Decimal arithmetic, unlike `exp` of a C library, is the same on every machine.
    """
    weights = [1 << WEIGHT_BITS]
    while weights[-1]:
        exponent = Decimal(-len(weights)) / STEPS_PER_NAT
        weights.append(int((exponent.exp() * (1 << WEIGHT_BITS)).to_integral_value()))
    return np.array(weights, dtype=np.int64)


class Shifts:
    """Shifts of the grid for the tokens of a message: an encoder finds them, a decoder knows them.

    An entry is the number of a token times SHIFTS, plus its shift.
    """

    def __init__(self, known: Iterable[int] | None = None) -> None:
        """Find shifts, or repeat `known` entries."""
        self.finds, self.tokens = known is None, 0
        self.by_token = dict(divmod(entry, SHIFTS) for entry in known or ())

    @property
    def entries(self) -> tuple[int, ...]:
        """All shifts that are not 0."""
        return tuple(SHIFTS * token + shift for token, shift in self.by_token.items())

    def of(self, steps: np.ndarray) -> np.ndarray:
        """Return the shifts of the next tokens, [B, 1], for steps [B, V]."""
        tokens = range(self.tokens, self.tokens + len(steps))
        self.tokens += len(steps)
        for row in np.flatnonzero(_distance(steps) < MARGIN) if self.finds else ():
            distances = [_distance(steps[row] + SHIFT * shift) for shift in range(SHIFTS)]
            self.by_token[tokens[row]] = int(np.argmax(distances))
        return np.array([[self.by_token.get(token, 0)] for token in tokens])


def _distance(steps: np.ndarray) -> np.ndarray:
    """Return how close any of steps [..., V] is to a boundary of the rounding: [...]."""
    return np.abs(steps % 1 - 0.5).min(-1)


def to_frequencies(logits: Tensor, shifts: Shifts | None = None) -> np.ndarray:
    """Convert logits [B, V] in fp64 to integer frequencies [B, V] that sum to TOTAL.

    Raises: ValueError where the largest logit is nan or infinite, or the vocabulary is too large.
    """
    x = logits.detach().cpu().double().numpy()
    vocabulary = x.shape[-1]
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"the vocabulary is {vocabulary}, expected 1 to {MAX_VOCABULARY} tokens")
    largest = x.max(-1, keepdims=True)
    if not np.isfinite(largest).all():
        raise ValueError("logits are nan or infinite, expected numbers; the weights are damaged")
    table = exponential_table()
    steps = np.minimum((largest - x) * STEPS_PER_NAT, len(table) - 1)  # −∞ becomes the last
    if shifts is not None:
        steps += SHIFT * shifts.of(steps)
    weights = table[np.minimum(np.rint(steps).astype(np.int64), len(table) - 1)]
    frequencies = 1 + weights * (TOTAL - vocabulary) // weights.sum(-1, keepdims=True)
    rest = TOTAL - frequencies.sum(-1)
    rows = np.arange(len(x))
    frequencies[rows, frequencies.argmax(-1)] += rest
    return frequencies
