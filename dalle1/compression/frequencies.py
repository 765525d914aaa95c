"""Probabilities as integers that every machine computes alike.

An entropy decoder must have exactly the encoder's probabilities. Logits come in fp64 and are
rounded to a grid of 1/64 nat, far coarser than the differences between machines; from there on all
arithmetic is on integers.
"""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache

import numpy as np
from torch import Tensor

TOTAL = 1 << 24
"""Sum of the frequencies of a distribution; each of them is at least 1."""
MAX_VOCABULARY = TOTAL >> 4
STEPS_PER_NAT = 64
WEIGHT_BITS = 30


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


def to_frequencies(logits: Tensor) -> np.ndarray:
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
    weights = table[np.rint(steps).astype(np.int64)]
    frequencies = 1 + weights * (TOTAL - vocabulary) // weights.sum(-1, keepdims=True)
    rest = TOTAL - frequencies.sum(-1)
    rows = np.arange(len(x))
    frequencies[rows, frequencies.argmax(-1)] += rest
    return frequencies
