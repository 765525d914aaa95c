"""Where and how precisely things are computed."""

from __future__ import annotations

import ctypes
import sys
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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Compute matrix products and convolutions in bf16 where `precision` says so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


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
