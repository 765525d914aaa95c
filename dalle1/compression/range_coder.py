"""Arithmetic coding as a range coder on integers (Martin 1979).

The message is one number in an interval that every token narrows to its share; `low` and `width`
hold the interval's 48 lowest bits, and bytes that cannot change any more are written. A token of
frequency f takes log₂(TOTAL / f) bits, fractions of a bit included, and the message one byte more.
"""

from __future__ import annotations

import numpy as np

from dalle1.compression.frequencies import TOTAL

BITS = 48
TOP, BOTTOM = 1 << BITS, 1 << (BITS - 8)
"""The width of the interval is between BOTTOM and TOP, so that it always covers TOTAL."""


class RangeEncoder:
    """Writes tokens as bytes."""

    def __init__(self) -> None:
        self.low, self.width = 0, TOP
        self.written = bytearray()

    def code(self, frequencies: np.ndarray, token: int) -> int:
        """Write a token with frequencies [V] that sum to TOTAL, and return it."""
        unit = self.width // TOTAL
        self.low += unit * int(frequencies[:token].sum())
        self.width = unit * int(frequencies[token])
        if self.low >= TOP:
            self._carry()
        while self.width < BOTTOM:
            self._shift()
        return token

    def finish(self) -> bytes:
        """Return the message: the shortest number in the interval, without zeros at its end."""
        self.low += BOTTOM - 1
        if self.low >= TOP:
            self._carry()
        self._shift()
        return bytes(self.written).rstrip(b"\0")

    def _carry(self) -> None:
        """Add 1 to the written number."""
        self.low -= TOP
        last = len(self.written) - 1
        while self.written[last] == 255:
            self.written[last] = 0
            last -= 1
        self.written[last] += 1

    def _shift(self) -> None:
        """Write the highest byte of `low`."""
        self.written.append(self.low >> (BITS - 8))
        self.low = (self.low << 8) % TOP
        self.width <<= 8


class RangeDecoder:
    """Reads tokens that RangeEncoder wrote; damaged bytes give wrong tokens, not an error."""

    def __init__(self, message: bytes) -> None:
        self.message, self.read = message, BITS // 8
        start = message[: self.read].ljust(self.read, b"\0")
        self.offset, self.width = int.from_bytes(start, "big"), TOP

    def code(self, frequencies: np.ndarray, token: int = 0) -> int:
        """Read a token with the frequencies [V] that it was written with."""
        unit = self.width // TOTAL
        ends = frequencies.cumsum()
        token = int(ends.searchsorted(min(self.offset // unit, TOTAL - 1), side="right"))
        self.width = unit * int(frequencies[token])
        self.offset -= unit * int(ends[token] - frequencies[token])
        while self.width < BOTTOM:
            byte = self.message[self.read] if self.read < len(self.message) else 0
            self.offset = ((self.offset << 8) | byte) % TOP
            self.read += 1
            self.width <<= 8
        return token
