"""Where and how precisely things are computed."""

from __future__ import annotations

import ctypes
import math
import sys
import time
from contextlib import suppress

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h


def pick_device(name: str) -> torch.device:
    """Give the device of that name; auto is cuda, else mps, else cpu."""
    if name != "auto":
        try:
            device = torch.device(name)
            if device.type not in ("cpu", "cuda", "mps"):
                raise RuntimeError
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name!r} is not to be had here; try auto or cpu") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, precision: str, keep_casts: bool = True) -> torch.autocast:
    """Compute matrix products and convolutions in bf16 or fp16 where `precision` says so.

    Args:
        keep_casts: cast each weight only once, and keep that for as long as this lasts.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    enabled = precision != "fp32"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=keep_casts)


def matrix_rate(device: torch.device, precision: str, size: int = 2048) -> float:
    """Measure how many operations a second matrix products reach here: the best of five."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        b = a @ a
        float(b[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def peak_memory(device: torch.device) -> float:
    """Give the most memory that was held so far, in GiB: the GPU's, or else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the next step, which needs just as much again.

    By default every large tensor is mapped and faulted in anew: a third of a CPU training's time.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
                mallopt(parameter, 2**31 - 1)
            mallopt(_M_TOP_PAD, 2**28)
