"""A training's log: progress bar, console, OUT/log.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from dalle1.console import bar
from dalle1.data.images import read_image_file
from dalle1.devices import matmul_flops_per_second, peak_memory
from dalle1.json_files import parse_json
from dalle1.storage import write_atomic
from dalle1.training import distributed
from dalle1.training.config import TrainConfig
from dalle1.training.resume_key import resume_key
from dalle1.training.task import SampleCost

LOG_NAME = "log.jsonl"
SUPERSEDED_NAME = "superseded.jsonl"
"""Lines that were logged after the checkpoint that a later run resumed from."""


class Recorder(Protocol):
    """Receives what log.jsonl receives, and the sample images."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""

    def image(self, step: int, path: Path) -> None:
        """Record an image file."""

    def close(self) -> None:
        """Write what is still buffered."""


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard needs the package: pip install tensorboard") from error
        # Drops what a crashed run wrote past its last checkpoint, as in log.jsonl.
        self.writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        pixels = np.asarray(read_image_file(path))
        self.writer.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project, resumed by its id in OUT/wandb-id.txt."""

    def __init__(self, project: str, out: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("--wandb needs the package: pip install wandb") from error
        name = out / "wandb-id.txt"
        if not name.exists():
            name.write_text(uuid4().hex)
        self.wandb = wandb
        self.run = wandb.init(
            project=project,
            dir=str(out),
            id=name.read_text(),
            resume="allow",
            config=dict(config),
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, path: Path) -> None:
        self.run.log({"samples": self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


SHOWN = ("temperature", "beta")
"""Fields that the progress bar shows beside the loss, where a loss has them."""


class Progress:
    """Progress bar and log of a training from step `start` on.

    log.jsonl has one object per line. Lines past `start`, which a crashed run wrote, are moved to
    superseded.jsonl, as is an incomplete last line. Without a folder nothing is shown or written.
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
            _cut_log(out, start)
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
        throughput: Callable[[float], Mapping[str, float]] = lambda rate: {},
    ) -> None:
        """Log the values of an update, with the samples per second since the last line.

        Args:
            throughput: samples per second → more numbers.
        """
        if self.out is None:
            return
        rate = (step - self.seen) * self.batch_size / (time.perf_counter() - self.since)
        self._write(step, {**values, "samples_per_second": rate, **throughput(rate)})
        shown = {"loss": values["total"], **{k: values[k] for k in SHOWN if k in values}}
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
        self.bar.set_postfix_str(f"{text}  {rate:.3g} samples/s")
        self._restart_clock(step)

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log and print the numbers of a validation; its time does not count as training time."""
        if self.out is None:
            return
        self._write(step, {f"validation/{k}": v for k, v in numbers.items()})
        if (image := samples_path(self.out, step)).exists():
            for recorder in self.recorders:
                recorder.image(step, image)
        self.bar.write(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        self._restart_clock(step)

    def stopped(self, step: int) -> None:
        """Print that a signal ended the training here."""
        if self.out is not None:
            stopped = f"Stopped at step {step}, saved in {self.out}"
            self.bar.write(f"{stopped}; the same command resumes")

    def has(self, step: int) -> bool:
        """Whether a validation of this step is in the log."""
        lines = _lines(self.out / LOG_NAME) if self.out is not None else []
        return any(b'"validation/' in line and _step_of(line) == step for line in lines)

    def _write(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        numbers = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        assert self.out is not None
        with (self.out / LOG_NAME).open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        for recorder in self.recorders:
            recorder.numbers(step, numbers)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _cut_log(out: Path, start: int) -> None:
    """Move the lines of steps past `start` from the log to superseded.jsonl."""
    path = out / LOG_NAME
    kept: list[bytes] = []
    moved: list[bytes] = []
    for line in _lines(path):
        (kept if _step_of(line) <= start else moved).append(line + b"\n")
    if moved:
        with (out / SUPERSEDED_NAME).open("ab") as file:
            file.writelines(moved)
    write_atomic(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    """Return the step of a log line; infinity where a crash left the line incomplete."""
    try:
        return float(parse_json(line, dict)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def open_recorders(config: TrainConfig, start: int) -> list[Recorder]:
    """Return the recorders that `config` selects beside log.jsonl."""
    recorders: list[Recorder] = []
    if config.tensorboard:
        recorders.append(TensorBoard(config.out, start))
    if config.wandb:
        config.out.mkdir(parents=True, exist_ok=True)
        recorders.append(WeightsAndBiases(config.wandb, config.out, resume_key(config)))
    return recorders


def throughput(
    config: TrainConfig, device: torch.device, cost: SampleCost | None, rate: float
) -> dict[str, float]:
    """Return memory, tokens per second and model FLOPs utilisation at `rate` samples per second."""
    numbers = {"memory_gib": peak_memory(device)}
    if cost is not None:
        numbers["tokens_per_second"] = rate * cost.tokens
        flops = rate * cost.flops / distributed.world_size()
        numbers["mfu"] = flops / _matmul_flops(device, config.precision)
    return numbers


@cache
def _matmul_flops(device: torch.device, precision: str) -> float:
    size = 1024 if device.type == "cpu" else 2048  # takes milliseconds, and is fast enough
    return matmul_flops_per_second(device, precision, size)


def samples_path(out: Path, step: int) -> Path:
    """Return the file of a step's sample images."""
    return out / "samples" / f"step-{step}.png"
