"""Huffman coding of each token with its own distribution: the textbook's variant.

A code word has a whole number of bits, and at least one: where tokens have less than one bit of
entropy, arithmetic coding takes less. Code words are canonical: by length, then by token.
"""

from __future__ import annotations

from collections import deque

import numpy as np


def code_lengths(frequencies: np.ndarray) -> np.ndarray:
    """Return the length in bits of each token's Huffman code word [V]; 0 for a single token."""
    order = frequencies.argsort(kind="stable")
    leaves: deque[tuple[int, int]] = deque(zip(frequencies[order].tolist(), order.tolist()))
    vocabulary = len(order)
    parents = np.zeros(2 * vocabulary - 1, dtype=np.int64)
    inner: deque[tuple[int, int]] = deque()  # sums rise, so both queues are sorted
    for node in range(vocabulary, 2 * vocabulary - 1):
        pair = [
            (inner if not leaves or (inner and inner[0][0] < leaves[0][0]) else leaves).popleft()
            for _ in range(2)
        ]
        for _, child in pair:
            parents[child] = node
        inner.append((pair[0][0] + pair[1][0], node))
    depths = np.zeros(2 * vocabulary - 1, dtype=np.int64)
    for node in range(2 * vocabulary - 3, vocabulary - 1, -1):
        depths[node] = depths[parents[node]] + 1
    if vocabulary > 1:
        depths[:vocabulary] = depths[parents[:vocabulary]] + 1
    return depths[:vocabulary]


class HuffmanEncoder:
    """Writes tokens as bits."""

    def __init__(self) -> None:
        self.bits: list[str] = []

    def code(self, frequencies: np.ndarray, token: int) -> int:
        """Write a token with frequencies [V], and return it."""
        lengths = code_lengths(frequencies)
        own = int(lengths[token])
        if own:
            # The code words before its own, in units of the last bit of its own.
            counts = np.bincount(lengths)[:own].tolist()
            first = sum(count << (own - length) for length, count in enumerate(counts))
            word = first + int((lengths[:token] == own).sum())
            self.bits.append(f"{word:0{own}b}")
        return token

    def finish(self) -> bytes:
        """Return the message, filled up with zeros to whole bytes."""
        bits = "".join(self.bits)
        size = -(-len(bits) // 8)
        return int(bits.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")


class HuffmanDecoder:
    """Reads tokens that HuffmanEncoder wrote; damaged bytes give wrong tokens, not an error."""

    def __init__(self, message: bytes) -> None:
        self.message, self.read = message, 0

    def code(self, frequencies: np.ndarray, token: int = 0) -> int:
        """Read a token with the frequencies [V] that it was written with."""
        lengths = code_lengths(frequencies)
        word = first = 0
        for length, count in enumerate(np.bincount(lengths).tolist()):
            if length:
                word, first = 2 * word + self._bit(), 2 * first
            if word - first < count:
                return int(np.flatnonzero(lengths == length)[word - first])
            first += count
        raise AssertionError("the code words of a Huffman code cover all bit strings")

    def _bit(self) -> int:
        byte, bit = divmod(self.read, 8)
        self.read += 1
        return self.message[byte] >> (7 - bit) & 1 if byte < len(self.message) else 0
