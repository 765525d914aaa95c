"""Measure PowerSGD: loss and bytes on the wire of the same training, by rank of the matrices.

    unshare -n sh -c 'ip link set lo up; PYTHONPATH=.:tests/support torchrun --nproc-per-node 4 \
        tests/support/compressed_gradients.py OUT'

In a network namespace of its own, all bytes of the loopback device are those of the processes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import two_processes
from function_task import FunctionTask
from two_processes import SIZE, config_for, loss, stream

from dalle1.model.transformer import Transformer
from dalle1.training import distributed
from dalle1.training.loop import fit

STEPS = 120
RUNS: dict[str, dict[str, Any]] = {
    "uncompressed": {},
    **{f"rank {r}": {"gradient_compression": "powersgd", "rank": r} for r in (2, 8)},
}


def bytes_received() -> int:
    """Return the bytes that the loopback device received so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def main(out: Path) -> None:
    """Train once per entry of `RUNS`, and print a table."""
    distributed.init("cpu")
    size = replace(SIZE, width=64, depth=4, heads=4)
    for name, changes in RUNS.items():
        torch.manual_seed(0)
        config = config_for(
            out / name,
            steps=STEPS,
            schedule_steps=STEPS,
            warmup_steps=10,
            save_every=STEPS,
            **{"validate_every": STEPS, **changes},
        )
        distributed.barrier()
        before = bytes_received()
        fit(FunctionTask(Transformer(size), loss, stream), config)
        distributed.barrier()
        if distributed.is_main():
            lines = (out / name / "log.jsonl").read_text().splitlines()
            totals = [json.loads(line)["total"] for line in lines if '"total"' in line]
            last = sum(totals[-20:]) / len(totals[-20:])
            sent = (bytes_received() - before) / STEPS
            print(f"{name}: loss {last:.4f}, {sent / 1e3:,.0f} kB a step", flush=True)
    distributed.end_process()


if __name__ == "__main__":
    two_processes.BATCH = 8
    main(Path(sys.argv[1]))
