"""Recognise errors of exhausted memory, without importing torch."""

from __future__ import annotations


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that memory is exhausted, on a CPU or a GPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
