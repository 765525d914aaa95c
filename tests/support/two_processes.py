"""What tests/test_engines.py starts in two processes: short trainings on every engine."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from function_task import FunctionTask
from torch import Tensor, nn

from dalle1.model.transformer import Transformer, TransformerConfig, TransformerLoss
from dalle1.training import distributed, resblocks
from dalle1.training.config import TrainConfig
from dalle1.training.engines.deepspeed import partitioned
from dalle1.training.loop import fit

SIZE = TransformerConfig(
    text_vocab=13, text_len=5, codebook_size=11, grid_size=4, width=16, depth=3, heads=2
)
STEPS, BATCH = 50, 8

HALF = STEPS // 2

LOW_RANK: dict[str, Any] = {
    "gradient_compression": "powersgd",
    "rank": 2,
    "steps": 10,
    "save_every": 5,
    "warmup_steps": 2,
}

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "muon": {"optimizer": "muon", "steps": 5},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "zero2-offload": {"zero": 2, "offload": "cpu", "steps": 5},
    "zero3-offload": {"zero": 3, "offload": "cpu", "accumulate": 2, "steps": 5},
    "zero3-resumed": {"zero": 3, "keep": 1},  # of one process in plain torch
    "zero3-apart": {"deepspeed": Path("apart.json")},  # weights that are nowhere whole
    "zero2-bf16": {"zero": 2, "weights": "bf16", "precision": "bf16", "steps": 5},
    "zero3-bf16": {"zero": 3, "weights": "bf16", "precision": "bf16", "steps": 5},
    "zero3-stopped": {"zero": 3},
    "zero3-skipping": {"zero": 3, "steps": 4},
    "plain-10": {"steps": 10, "save_every": 5, "warmup_steps": 2},
    "powersgd": LOW_RANK,
    "powersgd-resumed": LOW_RANK,
    "powersgd-skipping": {**LOW_RANK, "steps": 5, "warmup_steps": 1},
}


def config_for(out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "schedule_steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": 3e-3,
        "final_learning_rate": 1e-4,
        "warmup_steps": 5,
        "weight_decay": 0.1,
        "variance_clip": 0.01,
        "clip_norm": 0.5,
        "ema_decay": 0.9,
        "device": "cpu",
        "precision": "fp32",
        "log_every": 1,
        "validate_every": HALF,
        "save_every": HALF,
        "keep": 2,
    }
    return TrainConfig(out=out, **{**settings, **changes})


def stream(start: int) -> Iterator[dict[str, Tensor]]:
    """Yield this process's parts of the batches: the same pairs for any number of processes."""
    step = start
    while True:
        rng = torch.Generator().manual_seed(step)
        text = torch.randint(13, (BATCH, 1), generator=rng).expand(-1, 5)
        codes = (text[:, :1] + torch.randint(3, (BATCH, 16), generator=rng)) % 11
        batch = {"text": text, "codes": codes}
        yield {k: v.chunk(distributed.world_size())[distributed.rank()] for k, v in batch.items()}
        step += 1


def loss(
    model: Transformer, batch: Mapping[str, Tensor], step: int, noise: torch.Generator
) -> TransformerLoss:
    return model.loss(batch["text"], batch["codes"])


def knock(
    model: Transformer, batch: Mapping[str, Tensor], step: int, noise: torch.Generator
) -> TransformerLoss:
    """In the third step, have a signal reach the second process alone."""
    if step == 2 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss(model, batch, step, noise)


def diverge(
    model: Transformer, batch: Mapping[str, Tensor], step: int, noise: torch.Generator
) -> TransformerLoss:
    """Return NaN in the third step, in the second process alone."""
    good = loss(model, batch, step, noise)
    bad = step == 2 and distributed.rank() == 1
    return replace(good, total=good.total * math.nan) if bad else good


def validate(model: Transformer) -> dict[str, float]:
    batch = next(iter(stream(1_000_000)))
    whole = {k: v[: BATCH // 2] for k, v in batch.items()} if distributed.is_main() else batch
    with torch.no_grad():
        return {"loss": float(model.loss(**whole).total)}


class Scaled(nn.Module):
    """What DeepSpeed by itself does not take: a scalar, and memory in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return (self.convolution(x) * self.scale.clamp(max=5).exp()).mean((2, 3))


@dataclass(frozen=True)
class Contrast:
    total: Tensor


def contrast(
    model: Scaled, batch: Mapping[str, Tensor], step: int, noise: torch.Generator
) -> Contrast:
    """Compare all images of the whole batch with each other."""
    features = distributed.gather(model(batch["x"]))
    return Contrast(total=(features @ features.T).softmax(0).square().sum())


def images(start: int) -> Iterator[dict[str, Tensor]]:
    step = start
    while True:
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        yield {"x": x.chunk(distributed.world_size())[distributed.rank()]}
        step += 1


def train_scaled(out: Path, zero: Literal[0, 1, 2, 3] = 0) -> None:
    config = config_for(out, zero=zero, steps=4, batch_size=4)
    distributed.init("cpu")
    torch.manual_seed(0)
    fit(FunctionTask(Scaled(), contrast, images), config)


def train(out: Path, loss: Any = loss, **changes: Any) -> None:
    config = config_for(out, **changes)
    distributed.init("cpu")
    torch.manual_seed(0)
    with partitioned(config):
        model = Transformer(SIZE)
    resblocks.prepare(model, checkpointing=True)
    fit(FunctionTask(model, loss, stream, validate=validate, save=Transformer.save), config)


def keep_nothing_whole(path: Path) -> None:
    """Write a config of DeepSpeed in which no weight is small enough to stay in every process."""
    sharing = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": False,
    }
    path.write_text(json.dumps({"zero_optimization": sharing}))


def main(out: Path) -> None:
    os.chdir(out)
    if distributed.init("cpu") and distributed.is_main():
        keep_nothing_whole(out / "apart.json")
    distributed.barrier()
    special = {"zero3-stopped": knock, "zero3-skipping": diverge, "powersgd-skipping": diverge}
    for name, changes in RUNS.items():
        if name == "powersgd-resumed" and distributed.is_main():
            shutil.copytree(out / "powersgd" / "step-5", out / name / "step-5")
        distributed.barrier()
        try:
            train(out / name, special.get(name, loss), **changes)
        except SystemExit as stop:
            assert (name, stop.code) == ("zero3-stopped", 0)  # noqa: PT017
    for stage in (0, 1, 2, 3):
        train_scaled(out / f"scaled{stage}", stage)
    distributed.end_process()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
