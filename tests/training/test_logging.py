"""Progress and recorders: the log, TensorBoard and Weights & Biases receive the same values."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from function_task import FunctionTask
from torch import Tensor, nn

from dalle1.training.config import TrainConfig
from dalle1.training.logging import Progress
from dalle1.training.loop import fit


@dataclass(frozen=True, kw_only=True)
class Total:
    total: Tensor


def train(out: Path, **changes: Any) -> None:
    """Train one weight for a few steps."""

    def stream(start: int) -> Iterator[dict[str, Tensor]]:
        while True:
            yield {"x": torch.ones(4, 1)}

    def loss(model: nn.Module, batch: Any, step: int, generator: torch.Generator) -> Total:
        return Total(total=(model(batch["x"]) - step).square().mean())

    plain = {"steps": 12, "batch_size": 4, "log_every": 1, "validate_every": 5, "save_every": 3}
    config = TrainConfig(out=out, device="cpu", precision="fp32", **{**plain, **changes})
    weight = lambda model: {"weight": float(model.weight)}  # noqa: E731
    fit(FunctionTask(nn.Linear(1, 1), loss, stream, validate=weight), config)


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Remembered:
    """A recorder that keeps what it was settings."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.received.append((step, dict(values)))

    def image(self, step: int, path: Path) -> None:
        self.received.append((step, path.name))

    def close(self) -> None:
        self.received.append("closed")


def test_recorders_receive_what_the_log_does(tmp_path: Path) -> None:
    recorder = Remembered()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/step-4.png").touch()
    with Progress(tmp_path, 0, 10, 4, [recorder]) as progress:
        progress.advance()
        progress.log(2, {"total": torch.tensor(0.5), "skipped/too small": 3})
        progress.report(4, {"psnr": 20.0})
    lines = log_of(tmp_path)
    assert lines[0]["skipped/too small"] == 3
    numbers = [(line.pop("step"), line) for line in lines]
    assert recorder.received == [numbers[0], numbers[1], (4, "step-4.png"), "closed"]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {line["step"]: line["total"] for line in log_of(tmp_path) if "total" in line}
    shown = {event.step: event.value for event in events.Scalars("total")}
    assert shown == pytest.approx(logged, rel=1e-5)
    assert [event.step for event in events.Scalars("validation/weight")] == [5, 10, 12]


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = ModuleType("wandb")
    fake.init = lambda **settings: calls.append(settings) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tmp_path, steps=2, wandb="dalle1")
    train(tmp_path, steps=3, wandb="dalle1")  # the same run is resumed
    started = [call for call in calls if isinstance(call, dict)]
    assert [(s["project"], s["resume"]) for s in started] == [("dalle1", "allow")] * 2
    assert started[0]["id"] == started[1]["id"] == (tmp_path / "wandb-id.txt").read_text()
    assert started[0]["config"]["learning_rate"] == "0.001"
    steps = [call[0] for call in calls if isinstance(call, tuple)]
    assert steps == [1, 2, 2, 3, 3]
    assert calls.count("end") == 2


@pytest.mark.parametrize(
    ("flags", "package"),
    [({"tensorboard": True}, "tensorboard"), ({"wandb": "dalle1"}, "wandb")],
)
def test_a_missing_logger_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], package: str
) -> None:
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"--{package} needs the package: pip install {package}"):
        train(tmp_path, **flags)
