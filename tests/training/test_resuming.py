"""Trainings resume exactly after crashes and signals, and log and save when it is due."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from function_task import FunctionTask
from tiny_regression import (
    Noisy,
    fresh,
    log_of,
    run_config,
    squared_error,
    stream,
    tensors_of,
    train,
)
from torch import Tensor, nn

from dalle1.training.checkpoint import load_checkpoint
from dalle1.training.logging import Progress
from dalle1.training.loop import fit


def validations(out: Path) -> list[dict[str, float]]:
    return [line for line in log_of(out) if "validation/norm" in line]


def flat(state: Any) -> list[Tensor]:
    """Return all tensors of a nested state, in order."""
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    return [t for v in values if isinstance(v, dict | list | tuple | Tensor) for t in flat(v)]


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
