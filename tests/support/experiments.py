"""What experiments on trainings and samplers share: copies of this process, logged losses."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(action: Callable[[], object], log: Path) -> int:
    """Run a function in a copy of this process, which appends to `log`; return its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(handle, stream)
        action()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def losses(out: Path) -> dict[int, dict[str, float]]:
    """Return the logged values of each step, without a line that was cut off."""
    found: dict[int, dict[str, float]] = {}
    path = out / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if "total" in values:
            names = ("total", "text", "image", "gradient_norm", "learning_rate")
            found[values["step"]] = {name: values[name] for name in names}
    return found
