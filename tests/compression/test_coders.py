"""Entropy coders: round trips of random and adversarial distributions, sizes, and damage."""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np
import pytest
import torch

from dalle1.compression.frequencies import TOTAL, Shifts, exponential_table, to_frequencies
from dalle1.compression.huffman import HuffmanDecoder, HuffmanEncoder, code_lengths
from dalle1.compression.range_coder import RangeDecoder, RangeEncoder

CODERS: dict[str, tuple[Any, Any]] = {
    "range": (RangeEncoder, RangeDecoder),
    "huffman": (HuffmanEncoder, HuffmanDecoder),
}


def encoded(kind: str, frequencies: np.ndarray, tokens: list[int]) -> bytes:
    encoder = CODERS[kind][0]()
    for row, token in zip(frequencies, tokens, strict=True):
        assert encoder.code(row, token) == token
    return encoder.finish()


def decoded(kind: str, frequencies: np.ndarray, message: bytes) -> list[int]:
    decoder = CODERS[kind][1](message)
    return [decoder.code(row) for row in frequencies]


def ideal_bits(frequencies: np.ndarray, tokens: list[int]) -> float:
    return float(-np.log2(frequencies[np.arange(len(tokens)), tokens] / TOTAL).sum())


def logits_of(rng: np.random.Generator, count: int, vocabulary: int, scale: float) -> torch.Tensor:
    return torch.from_numpy(scale * rng.standard_normal((count, vocabulary)))


@pytest.mark.parametrize(("kind", "codes", "vocabulary"), [("range", 16, 24), ("huffman", 4, 5)])
def test_a_thousand_random_grids_return(kind: str, codes: int, vocabulary: int) -> None:
    """Flat to peaked distributions, all in one message as in a batch."""
    rng = np.random.default_rng(0)
    frequencies = np.concatenate(
        [
            to_frequencies(logits_of(rng, 200 * codes, vocabulary, scale))
            for scale in (0.1, 1, 3, 10, 100)
        ]
    )
    tokens = rng.integers(vocabulary, size=1000 * codes).tolist()
    message = encoded(kind, frequencies, tokens)
    assert decoded(kind, frequencies, message) == tokens
    if kind == "range":
        assert len(message) * 8 - ideal_bits(frequencies, tokens) < 16


@pytest.mark.parametrize("kind", CODERS)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 512, 16_384])
@pytest.mark.parametrize("scale", [0.0, 3.0, 1e4])
def test_adversarial_distributions_return(kind: str, vocabulary: int, scale: float) -> None:
    """Tokens of probability near 0 and near 1, alternating, and those at both ends."""
    rng = np.random.default_rng(1)
    each = to_frequencies(logits_of(rng, 2, vocabulary, scale))
    largest, smallest = each.argmax(-1), each.argmin(-1)
    cases = [largest, smallest, [0, vocabulary - 1], [largest[0], smallest[1]]]
    repeats = 1 if vocabulary > 512 else 4
    frequencies = np.tile(each, (repeats, 1))
    for case in cases[-1:] if kind == "huffman" and vocabulary > 512 else cases:
        tokens = [int(token) for token in case] * repeats
        message = encoded(kind, frequencies, tokens)
        assert decoded(kind, frequencies, message) == tokens
        if kind == "range":
            assert len(message) * 8 <= ideal_bits(frequencies, tokens) + 16


def test_carries_run_through_many_bytes() -> None:
    """Upper halves keep every bit of `low` 1, until the last token decides."""
    halves = np.full((400, 2), TOTAL // 2)
    for last in (0, 1):
        tokens = [1] * 399 + [last]
        assert decoded("range", halves, encoded("range", halves, tokens)) == tokens
    thirds = np.tile(np.array([[TOTAL // 3, TOTAL // 3, TOTAL - 2 * (TOTAL // 3)]]), (3000, 1))
    tokens = np.random.default_rng(2).choice(3, 3000, p=[0.01, 0.01, 0.98]).tolist()
    assert decoded("range", thirds, encoded("range", thirds, tokens)) == tokens


def test_range_coding_beats_huffman_below_one_bit() -> None:
    likely = np.tile(np.array([[TOTAL - TOTAL // 16, TOTAL // 16]]), (4000, 1))
    tokens = (np.random.default_rng(3).random(4000) < 1 / 16).astype(int).tolist()
    sizes = {kind: len(encoded(kind, likely, tokens)) for kind in CODERS}
    assert sizes["huffman"] == 500  # a whole bit each
    assert sizes["range"] == pytest.approx(ideal_bits(likely, tokens) / 8, abs=2)
    assert sizes["range"] < 200


def test_huffman_code_lengths_are_optimal() -> None:
    rng = np.random.default_rng(4)
    for vocabulary in (2, 3, 7, 100):
        frequencies = to_frequencies(logits_of(rng, 1, vocabulary, 3))[0]
        heap, cost = frequencies.tolist(), 0
        heapq.heapify(heap)
        while len(heap) > 1:
            pair = heapq.heappop(heap) + heapq.heappop(heap)
            cost += pair
            heapq.heappush(heap, pair)
        lengths = code_lengths(frequencies)
        assert int((lengths * frequencies).sum()) == cost
        assert sum(2.0 ** -int(length) for length in lengths) == 1.0


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e300])
def test_frequencies_sum_to_the_total_and_follow_the_softmax(scale: float) -> None:
    logits = logits_of(np.random.default_rng(5), 20, 300, scale)
    frequencies = to_frequencies(logits)
    assert frequencies.min() >= 1
    assert (frequencies.sum(-1) == TOTAL).all()
    expected = logits.softmax(-1).numpy()
    assert np.abs(frequencies / TOTAL - expected).max() < 0.02
    losses = expected * (np.log(expected, where=expected > 0, out=np.zeros_like(expected)))
    divergence = (losses - expected * np.log(frequencies / TOTAL)).sum(-1).mean() / math.log(2)
    assert divergence < 5e-4


def test_small_differences_between_machines_do_not_matter() -> None:
    rng = np.random.default_rng(6)
    logits = logits_of(rng, 100, 512, 5)
    noise = torch.from_numpy(1e-12 * rng.standard_normal(logits.shape))
    assert (to_frequencies(logits + noise) == to_frequencies(logits)).all()
    assert (to_frequencies(logits + 1000) == to_frequencies(logits)).all()


@pytest.mark.parametrize("unit", [1 / 128, 1 / 1024, 1 / 4096])
def test_logits_on_boundaries_are_rounded_alike_by_a_transmitted_shift(unit: float) -> None:
    rng = np.random.default_rng(8)
    logits = torch.from_numpy(unit * rng.integers(-4000, 4000, size=(50, 300)))
    noisy = logits + torch.from_numpy(1e-10 * rng.standard_normal(logits.shape))
    assert (to_frequencies(noisy) != to_frequencies(logits)).any()
    shifts = Shifts()
    frequencies = to_frequencies(logits, shifts)
    assert (to_frequencies(noisy, Shifts(shifts.entries)) == frequencies).all()
    likelihoods = logits.log_softmax(-1).exp().numpy()
    assert np.abs(frequencies / TOTAL - likelihoods).max() < 0.02


def test_few_of_ordinary_logits_need_a_shift() -> None:
    """One in 15,000 of 512: 2 · 64 · 1e-9 of each, as the margin is 1e-9 nats on both sides."""
    rng, shifts = np.random.default_rng(9), Shifts()
    for _ in range(5):
        to_frequencies(logits_of(rng, 1000, 512, 2), shifts)
    assert shifts.tokens == 5000
    assert len(shifts.entries) < 5


def test_the_table_of_exponentials_is_exact() -> None:
    table = exponential_table()
    expected = [round(2**30 * math.exp(-i / 64)) for i in range(len(table))]
    assert table.tolist() == expected
    assert table[-1] == 0 < table[-2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="logits are nan or infinite, expected numbers"):
        to_frequencies(torch.tensor([[0.0, bad]]))


def test_hidden_tokens_may_have_a_logit_of_minus_infinity() -> None:
    frequencies = to_frequencies(torch.tensor([[0.0, -math.inf, 0.0]]))
    assert frequencies.tolist() == [[TOTAL // 2, 1, TOTAL // 2 - 1]]


@pytest.mark.parametrize("kind", CODERS)
def test_damaged_messages_decode_to_wrong_tokens_without_an_error(kind: str) -> None:
    rng = np.random.default_rng(7)
    frequencies = to_frequencies(logits_of(rng, 100, 40, 2))
    tokens = rng.integers(40, size=100).tolist()
    message = encoded(kind, frequencies, tokens)
    for position in range(0, len(message), 13):
        damaged = bytearray(message)
        damaged[position] ^= 1 + int(rng.integers(255))
        assert decoded(kind, frequencies, bytes(damaged)) != tokens
    assert decoded(kind, frequencies, message[: len(message) // 2]) != tokens
    assert len(decoded(kind, frequencies, rng.bytes(len(message)))) == 100
