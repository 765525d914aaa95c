"""The Task contract: several losses, precision by the machine, one path from batch to update."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from function_task import FunctionTask
from torch import Tensor, nn
from torch.func import functional_call

from dalle1.config import check_literals
from dalle1.training.config import TrainConfig, resolve_precision
from dalle1.training.loop import fit
from dalle1.training.resume_key import resume_key

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class GeneratorLoss:
    total: Tensor
    generator: Tensor


@dataclass(frozen=True, kw_only=True)
class DiscriminatorLoss:
    total: Tensor
    discriminator: Tensor


class Gan(nn.Module):
    """Learns to sample from N(3, 0.1)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Linear(1, 1)
        self.discriminator = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


def gan_losses(
    model: Gan, batch: Any, step: int, rng: torch.Generator
) -> list[GeneratorLoss | DiscriminatorLoss]:
    fake = model.generator(batch["noise"])
    fixed = {name: p.detach() for name, p in model.discriminator.named_parameters()}
    generator = nn.functional.softplus(-functional_call(model.discriminator, fixed, fake)).mean()
    real_score, fake_score = model.discriminator(batch["real"]), model.discriminator(fake.detach())
    discriminator = nn.functional.softplus(-real_score).mean()
    discriminator = discriminator + nn.functional.softplus(fake_score).mean()
    return [
        GeneratorLoss(total=generator, generator=generator),
        DiscriminatorLoss(total=discriminator, discriminator=discriminator),
    ]


def gan_batches(start: int) -> Iterator[dict[str, Tensor]]:
    while True:
        rng = torch.Generator().manual_seed(start)
        real = 3 + 0.1 * torch.randn(32, 1, generator=rng)
        yield {"real": real, "noise": 0.1 * torch.randn(32, 1, generator=rng)}
        start += 1


def test_two_losses_train_both_parts_of_a_gan(tmp_path: Path) -> None:

    model = Gan()
    before = [p.detach().clone() for p in model.parameters()]
    settings: dict[str, Any] = {"device": "cpu", "precision": "fp32", "log_every": 1}
    config = TrainConfig(
        out=tmp_path, steps=300, batch_size=32, learning_rate=0.02, ema_decay=0.0, **settings
    )
    fit(FunctionTask(model, gan_losses, gan_batches), config)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    mean = float(model.generator(torch.zeros(1, 1)))
    assert mean == pytest.approx(3, abs=1)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["total"] == pytest.approx(line["generator"] + line["discriminator"], rel=1e-5)


def test_precision_auto_is_what_the_machine_computes_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(out=tmp_path)
    assert config.precision == "auto"
    for native, expected in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        monkeypatch.setattr(
            "dalle1.training.config.pick_precision", lambda name, device, native=native: native
        )
        resolved = resolve_precision(config, CPU)
        assert resolve_precision(resolved, CPU) is resolved
        assert resume_key(resolved)["precision"] == expected
    # A GPU without bf16: fp16 where gradients can be scaled, which ZeRO does not support.
    monkeypatch.setattr("dalle1.training.config.pick_precision", lambda *_: torch.float16)
    assert resolve_precision(config, CPU).precision == "fp16"
    for flags in ({"zero": 2}, {"gradient_compression": "powersgd"}):
        assert resolve_precision(TrainConfig(out=tmp_path, **flags), CPU).precision == "fp32"


def test_literals_are_checked_by_their_annotations(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path)
    check_literals(config)
    object.__setattr__(config, "schedule", "linear")
    with pytest.raises(ValueError, match="schedule is 'linear', expected cosine or plateau"):
        check_literals(config)
