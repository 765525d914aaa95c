"""Devices, precision, memory and CUDA graphs."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; auto is cuda, else mps, else cpu."""
    if name != "auto":
        try:
            device = torch.device(name)
            if device.type not in ("cpu", "cuda", "mps"):
                raise RuntimeError
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name!r} is not available; use auto or cpu") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, precision: str, keep_casts: bool = True) -> torch.autocast:
    """Return the autocast context for `precision`: bf16, fp16, or fp32 (disabled).

    Args:
        keep_casts: cast each weight once and keep the copy until the context ends.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    enabled = precision != "fp32"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=keep_casts)


@contextmanager
def inference(device: torch.device, precision: str = "fp32") -> Iterator[None]:
    """Compute without gradients in `precision`, whatever the caller's autocast is.

    Unlike those of torch.inference_mode, the results can be trained on.
    """
    with torch.no_grad(), autocast(device, precision):
        yield


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; auto is bf16 where the hardware supports it.

    Otherwise auto is fp16 on a GPU and fp32 on a CPU.
    """
    if name != "auto":
        if name not in PRECISIONS:
            raise ValueError(f"precision is {name!r}, expected auto or {' or '.join(PRECISIONS)}")
        return PRECISIONS[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # since torch 2.11
        can = torch.cpu.get_capabilities()
        if can.get("avx512_bf16") or can.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


MEMINFO = Path("/proc/meminfo")
CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Folder, limit, use, and the page cache within that use, of cgroups of version 2 and 1."""


def free_memory(device: torch.device) -> int:
    """Return an estimate of the bytes that are free on `device`; the page cache counts as free."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu" or "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 4 * 2**30
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, KeyError):  # Linux; it counts the page cache as free
        free = _numbers(MEMINFO)["MemAvailable:"] * 2**10
    for folder, limit, used, cache in CGROUPS:
        with suppress(OSError, ValueError):  # a container may have a lower limit
            taken = int((folder / used).read_text()) - _numbers(folder / "memory.stat").get(
                cache, 0
            )
            free = min(free, int((folder / limit).read_text()) - taken)
    return max(0, free)


def _numbers(path: Path) -> dict[str, int]:
    """Read a file of the kernel with a name and a number in each line."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def matmul_flops_per_second(device: torch.device, precision: str, size: int = 2048) -> float:
    """Return the floating-point operations per second of matrix products: the best of five."""
    a = torch.ones(size, size, dtype=PRECISIONS[precision], device=device)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        b = a @ a
        float(b[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of the GPU, or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def cuda_graphed(step: Callable[[], None], warm_up: int = 2) -> Callable[[], None]:
    """Record `step` as a CUDA graph after a few calls, and replay it from then on.

    One launch then replaces the hundreds of a step, which dominate its time at small batches.
    """
    calls, graph = 0, torch.cuda.CUDAGraph()

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls <= warm_up:
            step()
            return
        if calls == warm_up + 1:
            # The default capture stream belongs to the device that first captured a graph.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                step()
        graph.replay()

    return call
