"""The loop's updates: by hand, in parts of a batch, skipped if they are NaN; its settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from function_task import FunctionTask
from tiny_regression import (
    Noisy,
    SquaredError,
    batch_at,
    fresh,
    log_of,
    run_config,
    save_plain,
    squared_error,
    stream,
    tensors_of,
    train,
)
from torch import nn

from dalle1.data.loader import Batch
from dalle1.training.checkpoint import load_checkpoint
from dalle1.training.config import TrainConfig
from dalle1.training.loop import fit
from dalle1.training.trainer import Trainer, step_rng

CPU = torch.device("cpu")


def trainer_of(model: nn.Module, config: TrainConfig, loss: Any = squared_error) -> Trainer:
    return Trainer(FunctionTask(model, loss), config)


def update(trainer: Trainer, step: int) -> dict[str, Any]:
    return trainer.update(Batch(tensors=batch_at(step)))


# Updates


def test_updates_by_hand(tmp_path: Path) -> None:
    config = run_config(
        tmp_path, clip_norm=1.5, weight_decay=0.3, beta2=0.98, ema_decay=0.3, learning_rate=0.01
    )
    torch.manual_seed(1)
    trainer = trainer_of(nn.Linear(3, 2), config)
    model = trainer.engine.model
    w, b = (p.detach().double().numpy().copy() for p in model.parameters())
    average = [w.copy(), b.copy()]
    m, v = [np.zeros_like(w), np.zeros_like(b)], [np.zeros_like(w), np.zeros_like(b)]
    clipped = 0
    for step in range(10):
        values = update(trainer, step)
        x, y = (t.double().numpy() for t in batch_at(step).values())
        error = x @ w.T + b - y
        gradients = [2 * error.T @ x / 8, 2 * error.sum(0) / 8]
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        clipped += norm > 1.5
        rate = 0.01 * (step + 1) / 3
        if step >= 3:
            rate = 0.001 + 0.009 * (1 + math.cos(math.pi * (step - 3) / 9)) / 2
        assert float(values["total"]) == pytest.approx((error**2).mean(), rel=1e-4)
        assert float(values["largest"]) == pytest.approx((error**2).max(), rel=1e-4)
        assert float(values["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
        assert values["learning_rate"] == pytest.approx(rate)
        for i, (weight, decay) in enumerate([(w, 0.3), (b, 0.0)]):  # a bias does not decay
            gradient = gradients[i] * min(1, 1.5 / norm)
            m[i] = 0.9 * m[i] + 0.1 * gradient
            v[i] = 0.98 * v[i] + 0.02 * gradient**2
            direction = m[i] / (1 - 0.9 ** (step + 1))
            direction /= np.sqrt(v[i] / (1 - 0.98 ** (step + 1))) + 1e-8
            weight -= rate * (decay * weight + direction)
            ema = min(0.3, (2 + step) / (11 + step))
            average[i] = ema * average[i] + (1 - ema) * weight
    assert clipped > 0
    assert trainer.step == 10
    for kind, expected in (("weights", [w, b]), ("ema", average)):
        for shard, value in zip(trainer.engine.shards(), expected, strict=True):
            found = shard.tensors[kind].detach().numpy()
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_weights_stay(tmp_path: Path) -> None:
    model = fresh()
    model[0].requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    update(trainer_of(model, run_config(tmp_path)), 0)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, True, True]


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_is_the_batch(tmp_path: Path, parts: int) -> None:
    whole = trainer_of(fresh(), run_config(tmp_path))
    in_parts = trainer_of(fresh(), run_config(tmp_path, accumulate=parts))
    for step in range(5):
        one = update(whole, step)
        other = update(in_parts, step)
        for name in ("total", "gradient_norm", "learning_rate"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-5)
    for a, b in zip(whole.engine.shards(), in_parts.engine.shards(), strict=True):
        torch.testing.assert_close(a.tensors["weights"], b.tensors["weights"])


def test_parts_of_a_batch_have_noise_of_their_own(tmp_path: Path) -> None:
    numbers = []

    def loss(model: nn.Module, batch: Any, step: int, generator: torch.Generator) -> SquaredError:
        numbers.append(torch.rand(1, generator=generator).item())
        return squared_error(model, batch, step, generator)

    trainer = trainer_of(fresh(), run_config(tmp_path, accumulate=2), loss)
    for step in range(2):
        update(trainer, step)
    assert len(set(numbers)) == 4


def test_the_step_size_stays_at_its_end(tmp_path: Path) -> None:
    trainer = trainer_of(fresh(), run_config(tmp_path, steps=20, schedule_steps=8))
    rates = [update(trainer, s)["learning_rate"] for s in range(12)]
    assert rates[7] > 0.001
    assert rates[8:] == [pytest.approx(0.001)] * 4


def test_noise_is_a_function_of_seed_and_step() -> None:
    def noise(seed: int, step: int) -> list[float]:
        return torch.rand(3, generator=step_rng(seed, step, CPU)).tolist()

    assert noise(1, 5) == noise(1, 5)
    assert len({tuple(noise(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_loss_decreases_and_the_average_is_returned(tmp_path: Path) -> None:
    loss = Noisy()
    model = train(tmp_path, loss, steps=60, ema_decay=0.8)
    assert loss.losses[59] < 0.5 * loss.losses[0]
    assert not model.training
    for name, same in (("average", True), ("weights", False)):
        kept = tensors_of(tmp_path)[f"{name}/0.weight"]
        assert torch.equal(kept, model[0].weight) == same
        folder = tmp_path / "latest" / ("" if same else "raw")
        saved = torch.load(folder / "model.pt", weights_only=True)
        assert torch.equal(saved["0.weight"], kept)


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("steps", "batch_size", "log_every", "ema_every")),
        ("plateau_window", 0),
        *(("clip_norm", value) for value in (0, -1, math.nan)),
        *((name, -1) for name in ("validate_every", "save_every")),
        *(("ema_decay", value) for value in (-0.1, 1.0)),
        ("precision", "fp8"),
        *(("accumulate", value) for value in (0, 3)),  # of a batch of 32
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is '?{value}'?, expected"):
        TrainConfig(out=Path("out"), **{name: value})


def test_an_infinite_limit_does_not_clip(tmp_path: Path) -> None:
    loss = squared_error
    runs = [train(tmp_path / str(limit), loss, clip_norm=limit) for limit in (1e9, math.inf)]
    assert all(map(torch.equal, *(run.state_dict().values() for run in runs)))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [{6}, {4, 5, 6, 9}, {*range(6, 17)}])
def test_updates_that_are_nan_are_skipped(tmp_path: Path, what: str, bad: set[int]) -> None:
    def loss(model: nn.Module, batch: Any, step: int, generator: torch.Generator) -> SquaredError:
        good = squared_error(model, batch, step, generator)
        if step not in bad:
            return good
        if what == "loss":
            return replace(good, total=good.total + math.inf)  # whose gradient is finite
        weight = model[0].weight  # the root of 0 has an infinite slope
        return replace(good, total=good.total + (0 * weight).abs().sqrt().sum())

    def run() -> nn.Module:
        how = run_config(tmp_path, steps=20)
        return fit(FunctionTask(fresh(), loss, stream, save=save_plain), how)

    if len(bad) < 10:
        assert all(p.isfinite().all() for p in run().parameters())
        log = [line for line in log_of(tmp_path) if "total" in line]
        assert [line.get("skipped_updates", 0) for line in log] == [
            sum(b < step for b in bad) for step in range(1, 21)
        ]
        assert load_checkpoint(tmp_path)["updates"] == 20 - len(bad)
    else:
        last = r"the last 10 updates, to step 16.*skipped.*last whole checkpoint is .*step-15"
        with pytest.raises(ValueError, match=last):
            run()
    assert all(t.isfinite().all() for t in tensors_of(tmp_path).values())
