"""Threads of a command: as many as there are idle processors, and one for small steps."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle1.model.transformer import Transformer

SHORTEST = 0.05
"""Seconds over which the use of processors is measured; the kernel counts in hundredths."""


SMALL_STEP = 1 << 28
"""Multiplications of a step below which a second thread takes longer than it saves."""


def threads_of_a_step(model: Transformer, candidates: int, most: int) -> int:
    """Return the threads for steps of sampling: 1 for small ones, see docs/experiments.md."""
    from dalle1.sampling.decoding import pick_window

    numbers = sum(parameter.numel() for parameter in model.layers.parameters())
    rows = candidates * pick_window(model, candidates)
    return 1 if rows * numbers < SMALL_STEP else most


class IdleProcessors:
    """Measure, from here to `threads`, how many processors other processes leave idle.

    Threads that share a processor with another process make all others wait, after every
    operation: beside two busy processes, two threads take twice as long as one.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self.stat = stat
        self.start = self._snapshot()

    def threads(self) -> int:
        """Return one thread for each idle processor, or what the user chose."""
        import torch

        count = None if "OMP_NUM_THREADS" in os.environ else self.count()
        return torch.get_num_threads() if count is None else min(count, torch.get_num_threads())

    def count(self) -> int | None:
        """Return the number of idle processors, at least 1; None where the system has no counts."""
        if self.start is None:
            return None
        time.sleep(max(0.0, SHORTEST - (time.perf_counter() - self.start[0])))
        if (now := self._snapshot()) is None:
            return None
        seconds, idle, used = (
            after - before for after, before in zip(now, self.start, strict=True)
        )
        return max(1, round((idle + used) / seconds))

    def _snapshot(self) -> tuple[float, float, float] | None:
        """Return the time, the idle time of this process's processors, and its own, in seconds.

        Processors that run only niced processes count as idle for a process that is not niced.
        """
        with suppress(OSError, ValueError, IndexError, AttributeError):
            names = {f"cpu{i}" for i in os.sched_getaffinity(0)}
            ticks, counted, is_niced = 0, 0, os.nice(0) > 0
            for line in self.stat.read_text().splitlines():
                name, *counts = line.split()
                if name in names:
                    _user, nice, _system, idle, wait = map(int, counts[:5])
                    ticks += idle + wait + (0 if is_niced else nice)
                    counted += 1
            idle_time = ticks / os.sysconf("SC_CLK_TCK")
            return (time.perf_counter(), idle_time, time.process_time()) if counted else None
        return None
