"""What a training shows: a progress bar, lines on the console, and OUT/log.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from dalle1.console import bar
from dalle1.training.recorders import Recorder

SHOWN = ("temperature", "beta")
"""What the bar shows beside the loss, where there is such a thing."""


class Progress:
    """The bar and the log of a run of `steps` steps, from step `start` on.

    log.jsonl has one object a line; lines past `start`, of a run that died, are dropped, and so is
    one that it left half written. Without a folder nothing is shown or written.
    """

    def __init__(
        self,
        out: Path | None,
        start: int,
        steps: int,
        batch_size: int,
        recorders: Sequence[Recorder] = (),
    ) -> None:
        self.out, self.recorders = out, recorders
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            path = out / "log.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{x}\n" for x in lines if _step_of(x) <= start))
            os.replace(partial, path)
        self.bar = bar(total=steps, initial=start, unit="step", disable=out is None)
        self.batch_size = batch_size
        self._restart_clock(start)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.bar.close()
        for recorder in self.recorders:
            recorder.close()

    def _restart_clock(self, step: int) -> None:
        self.since, self.seen = time.perf_counter(), step

    def advance(self) -> None:
        """Move the bar by one step."""
        self.bar.update()

    def log(
        self,
        step: int,
        values: Mapping[str, float | Tensor],
        efficiency: Callable[[float], Mapping[str, float]] = lambda rate: {},
    ) -> None:
        """Log the numbers of an update, and how many samples a second went through since.

        Args:
            efficiency: samples a second → more numbers.
        """
        if self.out is None:
            return
        rate = (step - self.seen) * self.batch_size / (time.perf_counter() - self.since)
        self._write(step, {**values, "samples_per_second": rate, **efficiency(rate)})
        shown = {"loss": values["total"], **{k: values[k] for k in SHOWN if k in values}}
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
        self.bar.set_postfix_str(f"{text}  {rate:.3g} samples/s")
        self._restart_clock(step)

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log and print the numbers of a validation; the time it took is no training time."""
        if self.out is None:
            return
        self._write(step, {f"validation/{k}": v for k, v in numbers.items()})
        if (picture := self.out / "samples" / f"step-{step}.png").exists():
            for recorder in self.recorders:
                recorder.picture(step, picture)
        self.bar.write(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        self._restart_clock(step)

    def stopped(self, step: int) -> None:
        """Say that a signal ended the training here."""
        if self.out is not None:
            at = f"Stopped at step {step}, saved in {self.out}"
            self.bar.write(f"{at}; the same command goes on")

    def has(self, step: int) -> bool:
        """Say whether a validation of this step is in the log."""
        if self.out is None or not (path := self.out / "log.jsonl").exists():
            return False
        lines = path.read_text().splitlines()
        return any('"validation/' in line and _step_of(line) == step for line in lines)

    def _write(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        numbers = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        assert self.out is not None
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        for recorder in self.recorders:
            recorder.numbers(step, numbers)


def _step_of(line: str) -> float:
    """Give the step of a line of the log; infinity where a crash left the line incomplete."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, TypeError, KeyError):
        return math.inf
