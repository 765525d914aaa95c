"""Recognise errors of exhausted memory, without importing torch."""

from __future__ import annotations


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that memory is exhausted, on a CPU or a GPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    texts = "can't allocate memory", "out of memory"  # of the CPU, and of NCCL
    return named or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))
