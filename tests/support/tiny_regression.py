"""A network of two layers that learns a linear map: its batches, losses, training and logs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from function_task import FunctionTask
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle1.training.checkpoint import TENSORS_NAME
from dalle1.training.config import TrainConfig
from dalle1.training.loop import fit


@dataclass(frozen=True, kw_only=True)
class SquaredError:
    total: Tensor
    largest: Tensor


def squared_error(
    model: nn.Module, batch: Any, step: int, generator: torch.Generator
) -> SquaredError:
    error = (model(batch["x"]) - batch["y"]).square()
    return SquaredError(total=error.mean(), largest=error.max())


def run_config(out: Path, **changes: Any) -> TrainConfig:
    plain: dict[str, Any] = {
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 0.05,
        "final_learning_rate": 0.001,
        "warmup_steps": 3,
        "ema_decay": 0.5,
        "device": "cpu",
        "precision": "fp32",
        "log_every": 1,
        "validate_every": 5,
        "save_every": 3,
    }
    return TrainConfig(out=out, **{**plain, **changes})


def batch_at(step: int) -> dict[str, Tensor]:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x @ torch.tensor([[1.0, -1.0], [2.0, 0.5], [0.0, 3.0]]) + 1}


def stream(start: int) -> Iterator[dict[str, Tensor]]:
    step = start
    while True:
        yield batch_at(step)
        step += 1


def fresh(hidden: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 2))


def save_plain(model: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")


class Noisy:
    """A loss with noise of the step, that keeps what it gave and meets with `accident`."""

    def __init__(self, accident: Callable[[int], None] | None = None) -> None:
        self.accident = accident
        self.losses: dict[int, float] = {}

    def __call__(
        self, model: nn.Module, batch: Any, step: int, generator: torch.Generator
    ) -> SquaredError:
        if self.accident:
            self.accident(step)
        noise = torch.randn(batch["x"].shape, generator=generator)
        loss = squared_error(model, {**batch, "x": batch["x"] + 0.1 * noise}, step, generator)
        assert step not in self.losses
        self.losses[step] = loss.total.item()
        return loss


def train(out: Path, loss: Any, **changes: Any) -> nn.Module:
    norm = lambda model: {"norm": sum(p.sum().item() for p in model.parameters())}  # noqa: E731
    task = FunctionTask(fresh(), loss, stream, validate=norm, save=save_plain)
    return fit(task, run_config(out, **changes))


def log_of(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    machine = ("samples_per_second", "memory_gib")
    return [{k: v for k, v in line.items() if k not in machine} for line in lines]


def tensors_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / "latest" / TENSORS_NAME)
