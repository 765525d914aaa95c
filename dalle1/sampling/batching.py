"""Batches of prompts × candidates that fit in memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from dalle1.devices import free_memory
from dalle1.memory_errors import out_of_memory
from dalle1.model.transformer import Transformer
from dalle1.sampling.kv_cache import decode_memory

MAX_CANDIDATES = 128
"""Most candidates of a batch; larger batches are hardly faster."""
FitsInMemory = Callable[[int, int], bool]
"""(prompts, candidates of each) → whether one batch can hold them."""


def check_counts(prompts: Sequence[str], batch_size: int | None, share: tuple[int, int]) -> None:
    """Raise a ValueError unless there is something to sample; see `DallE.sample`."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts is {prompts!r}, expected a list of at least one")
    if not 0 <= share[0] < share[1]:
        raise ValueError(f"share is {share}, expected (r, n) with r from 0 to n − 1")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")


def max_batch(
    model: Transformer,
    batch_size: int | None,
    captions: int = 1,
    processes: int = 1,
    together: int = 1,
) -> FitsInMemory:
    """Return a test of the size of a batch: `batch_size` candidates, or what fits in memory.

    Each candidate counts once for each of the captions that are read for its prompt. At most 128
    candidates (or `together`) in half of the free memory fit; on a CPU, in this process's share.
    """
    if batch_size is not None:
        return lambda prompts, candidates: prompts * candidates <= batch_size
    device = next(model.parameters()).device
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    prompt_bytes, candidate_bytes = (n * captions for n in decode_memory(model))

    def fits_in_memory(prompts: int, candidates: int) -> bool:
        needed = prompts * (prompt_bytes + candidates * candidate_bytes)
        return prompts * candidates <= max(MAX_CANDIDATES, together) and needed <= free / 2

    return fits_in_memory


def batched(
    sample: Callable[[range, range], Tensor], rows: range, columns: range, fits: FitsInMemory
) -> Iterator[tuple[range, range, Tensor]]:
    """Yield (prompts, candidates, codes) of batches that together cover rows × columns.

    When memory runs out nevertheless, this batch and all later ones are at most half as large.
    """
    waiting, most = [(rows, columns)], math.inf
    while waiting:
        rows, columns = waiting.pop()
        count = len(rows) * len(columns)
        if count == 1 or (count <= most and fits(len(rows), len(columns))):
            try:
                codes = sample(rows, columns)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or count == 1:
                    raise
                most = count // 2
                warnings.warn(f"out of memory; the batch size is now {most}", stacklevel=2)
            else:
                yield rows, columns, codes
                continue
        if len(rows) > 1:
            half = len(rows) // 2
            waiting += [(rows[half:], columns), (rows[:half], columns)]
        else:
            half = len(columns) // 2
            waiting += [(rows, columns[half:]), (rows, columns[:half])]
