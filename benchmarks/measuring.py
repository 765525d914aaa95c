"""How a step is timed, and how much memory it takes, each contender in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch


def peak_memory() -> float:
    """Return the peak memory of this process so far, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, after one warm-up call."""
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def in_fresh_process(args: Sequence[str]) -> dict[str, float]:
    """Run `python args` and give the JSON object that it prints last."""
    run = subprocess.run([sys.executable, *args], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])
