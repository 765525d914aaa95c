"""Recognise errors of exhausted memory, without importing torch."""

from __future__ import annotations

TEXTS = (
    *("can't allocate memory", "not enough memory"),  # torch's allocator, on Linux and Windows
    "could not create a primitive",  # oneDNN
    "out of memory",  # NCCL
)
"""Parts of messages of RuntimeErrors."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that memory is exhausted, on a CPU or a GPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS))
