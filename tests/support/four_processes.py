"""What tests/training/test_engines.py starts in four processes: trainings that resume.

Sums of two numbers are the same in either order; those of four are not.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from two_processes import train

from dalle1.training import distributed

RUNS: dict[str, dict[str, Any]] = {"plain": {}, **{f"zero{n}": {"zero": n} for n in (1, 2, 3)}}
STEPS, HALF = 4, 2


def main(out: Path) -> None:
    os.chdir(out)
    distributed.init("cpu")
    for name, changes in RUNS.items():
        changes = {**changes, "steps": STEPS, "save_every": HALF, "warmup_steps": 1}
        train(out / name, **changes)
        resumed = out / f"{name}-resumed"
        if distributed.is_main():
            shutil.copytree(out / name / f"step-{HALF}", resumed / f"step-{HALF}")
        distributed.barrier()
        train(resumed, **changes)
    distributed.end_process()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
