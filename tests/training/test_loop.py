"""The loop: schedules and updates by hand, exact resume, checkpoints that survive a crash."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from function_task import FunctionTask
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle1.data.loader import Batch
from dalle1.training.checkpoint import TENSORS_NAME, load_checkpoint
from dalle1.training.config import TrainConfig
from dalle1.training.logging import Progress
from dalle1.training.loop import fit
from dalle1.training.trainer import Trainer, step_rng

CPU = torch.device("cpu")


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


def trainer_of(model: nn.Module, config: TrainConfig, loss: Any = squared_error) -> Trainer:
    return Trainer(FunctionTask(model, loss), config)


def update(trainer: Trainer, step: int) -> dict[str, Any]:
    return trainer.update(Batch(tensors=batch_at(step)))


def log_of(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    machine = ("samples_per_second", "memory_gib")
    return [{k: v for k, v in line.items() if k not in machine} for line in lines]


def validations(out: Path) -> list[dict[str, float]]:
    return [line for line in log_of(out) if "validation/norm" in line]


def flat(state: Any) -> list[Tensor]:
    """Return all tensors of a nested state, in order."""
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    return [t for v in values if isinstance(v, dict | list | tuple | Tensor) for t in flat(v)]


def tensors_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / "latest" / TENSORS_NAME)


def assert_same_training(one: Path, other: Path) -> None:
    assert load_checkpoint(one) == load_checkpoint(other)
    first, second = tensors_of(one), tensors_of(other)
    assert len(first) == 4 * 4  # of each, its weights, their average, and AdamW's two moments
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (one / "latest/model.pt").read_bytes() == (other / "latest/model.pt").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Noisy]:
    """A training that nothing interrupted."""
    out, loss = tmp_path_factory.mktemp("whole"), Noisy()
    train(out, loss)
    return out, loss


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


# Interruptions


@pytest.mark.parametrize("at", [0, 7, 9])
def test_resumed_after_a_crash_is_uninterrupted(
    tmp_path: Path, whole: tuple[Path, Noisy], at: int
) -> None:
    def crash(step: int) -> None:
        if step == at:
            raise RuntimeError("the power is gone")

    first, second = Noisy(crash), Noisy()
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(tmp_path, first)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "tot')  # a line that the crash cut off
    train(tmp_path, second)
    assert min(second.losses) == at // 3 * 3  # the last checkpoint
    assert {**first.losses, **second.losses} == whole[1].losses
    assert_same_training(tmp_path, whole[0])
    assert log_of(tmp_path) == log_of(whole[0])


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 4), (signal.SIGINT, 5)])
def test_signal_saves_and_resumes(
    tmp_path: Path,
    whole: tuple[Path, Noisy],
    number: signal.Signals,
    at: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def knock(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), number)

    first, second = Noisy(knock), Noisy()
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, first)
    assert stop.value.code == 0
    assert list(first.losses) == [*range(at + 1)]  # that step is finished, and no further one
    assert f"Stopped at step {at + 1}, saved in {tmp_path}" in capsys.readouterr().out
    assert os.readlink(tmp_path / "latest") == f"step-{at + 1}"
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(tmp_path, second)
    assert f"Resuming at step {at + 1} of 12" in capsys.readouterr().out
    assert validations(tmp_path) == validations(whole[0])  # after step 6 there was no time for it
    assert {**first.losses, **second.losses} == whole[1].losses
    assert_same_training(tmp_path, whole[0])


@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_a_second_interrupt_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    times = iter([0.0, seconds, seconds])
    monkeypatch.setattr("dalle1.training.interrupts.monotonic", lambda: next(times))

    def knock_twice(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt if seconds > 1 else SystemExit):
        train(tmp_path, Noisy(knock_twice))
    assert os.readlink(tmp_path / "latest") == ("step-3" if seconds > 1 else "step-5")


def test_a_finished_training_is_left_alone(tmp_path: Path) -> None:
    model = train(tmp_path, Noisy())
    files = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    again = Noisy()
    same = train(tmp_path, again)
    assert not again.losses
    assert all(torch.equal(a, b) for a, b in zip(flat(model.state_dict()), flat(same.state_dict())))
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == files


def test_resuming_another_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path, Noisy(), steps=2)
    for other in (fresh(hidden=6), nn.Linear(3, 2)):
        with pytest.raises(ValueError, match="holds a training of another model") as error:
            fit(FunctionTask(other, squared_error, stream), run_config(tmp_path))
        assert str(tmp_path) in str(error.value)


# What is written


def test_log(whole: tuple[Path, Noisy]) -> None:
    lines = log_of(whole[0])
    losses = {line["step"]: line["total"] for line in lines if "total" in line}
    assert list(losses) == list(range(1, 13))
    for step, loss in whole[1].losses.items():
        assert losses[step + 1] == pytest.approx(loss, rel=1e-5)
    validations = [line["step"] for line in lines if "validation/norm" in line]
    assert validations == [5, 10, 12]
    assert len(lines) == 15
    fields = {"total", "largest", "gradient_norm", "learning_rate"}
    assert set(lines[0]) == {"step", *fields}


def test_log_and_checkpoints_come_when_they_are_due(tmp_path: Path) -> None:
    train(tmp_path, Noisy(), steps=7, log_every=3, validate_every=100, save_every=100)
    assert [line["step"] for line in log_of(tmp_path)] == [3, 6, 7, 7]  # with a last validation
    assert os.readlink(tmp_path / "latest") == "step-7"
    assert [f.name for f in tmp_path.glob("step-*")] == ["step-7"]


def test_log_moves_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    lines = ['{"step": 2, "total": 1.0}', '{"step": 4, "total": 0.5}', '{"step": 6, "to', "[1]"]
    lines.append('{"step": "three"}')
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    with Progress(tmp_path, 2, 10, 4) as progress:
        progress.log(4, {"total": torch.tensor(1 / 3)})
    first, second = (json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first == {"step": 2, "total": 1.0}
    assert second.pop("samples_per_second") > 0
    assert second == {"step": 4, "total": 0.333333}
    assert (tmp_path / "superseded.jsonl").read_text().splitlines() == lines[1:]  # nothing is lost


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
