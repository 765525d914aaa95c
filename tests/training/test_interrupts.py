"""What interrupts a training is reported in a line, and no finished work is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from function_task import FunctionTask
from torch import nn

from dalle1.console import keep_freed_memory
from dalle1.training import distributed, shared_folder
from dalle1.training.checkpoint import find_checkpoint
from dalle1.training.config import TrainConfig
from dalle1.training.interrupts import explain_failure, graceful_run
from dalle1.training.trainer import Trainer


def config_for(out: Path) -> TrainConfig:
    return TrainConfig(out=out, device="cpu", precision="fp32")


def test_before_the_first_step_there_is_nothing_to_save(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def prepare() -> None:
        with graceful_run(config_for(tmp_path)):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it continued")

    with pytest.raises(SystemExit) as stop:
        prepare()
    assert stop.value.code == 0
    assert capfd.readouterr().out.startswith("Stopped with nothing to save")


def test_a_process_that_does_not_see_the_checkpoint_of_rank_0_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = FunctionTask(nn.Linear(1, 1), lambda *_: [])
    trainer = Trainer(task, config_for(tmp_path))
    trainer.step = 3
    trainer.save()
    monkeypatch.setattr(shared_folder, "LAG", 0.01)
    monkeypatch.setattr(distributed, "broadcast_from_main", lambda find: "step-4")
    with pytest.raises(ValueError, match=r"not see .*step-4 of rank 0 after .*all machines share"):
        Trainer(task, config_for(tmp_path)).resume()


def test_a_checkpoint_that_appears_late_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = FunctionTask(nn.Linear(1, 1), lambda *_: [])
    trainer = Trainer(task, config_for(tmp_path / "main"))
    trainer.step = 3
    trainer.save()
    out = tmp_path / "late"
    (out / "step-3").mkdir(parents=True)

    def appear(seconds: float) -> None:
        shutil.copytree(tmp_path / "main/step-3", out / "step-3", dirs_exist_ok=True)

    monkeypatch.setattr(shared_folder.time, "sleep", appear)
    monkeypatch.setattr(distributed, "broadcast_from_main", lambda find: "step-3")
    found = shared_folder.shared_checkpoint(out)
    assert found is not None
    assert found.state["step"] == 3


def test_only_values_of_a_checkpoint_count_as_its_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = FunctionTask(nn.Linear(1, 1), lambda *_: [])
    trainer = Trainer(task, config_for(tmp_path))
    trainer.step = 3
    trainer.save()
    found = find_checkpoint(tmp_path)
    assert found is not None
    with monkeypatch.context() as context:
        context.setattr(trainer.engine, "load", lambda path: {}["a mistake in the code"])
        with pytest.raises(KeyError, match="a mistake"):
            trainer.resume()
    del found.state["updates"]
    monkeypatch.setattr("dalle1.training.trainer.shared_checkpoint", lambda out: found)
    with pytest.raises(ValueError, match=r"step-3 is damaged .*'updates'\); move it away"):
        trainer.resume()


def test_a_full_disk_is_reported_in_a_line(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "log.jsonl")
    expected = "log.jsonl could not be written: No space left.*checkpoint is [n]one"
    with pytest.raises(ValueError, match=expected), graceful_run(config_for(tmp_path)):
        raise full
    with pytest.raises(FileNotFoundError), graceful_run(config_for(tmp_path)):
        (tmp_path / "missing").read_text()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
        torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"),
    ],
)
def test_out_of_memory_names_what_to_lower(tmp_path: Path, error: Exception) -> None:
    expected = r"out of memory.*--accumulate 2 \(32 samples at once now\).*--zero 1"
    with (
        pytest.raises(ValueError, match=expected),
        explain_failure(TrainConfig(out=tmp_path, device="cpu")),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:24779."),
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3600000ms"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."),
        torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
    ],
)
def test_a_lost_process_is_reported_in_a_line(tmp_path: Path, error: Exception) -> None:
    expected = (
        rf"^rank 0 lost the connection to another process.*\({re.escape(str(error))}\).*"
        "checkpoint is [n]one.*resumes from it"
    )
    config = TrainConfig(out=tmp_path, device="cpu")
    with pytest.raises(ValueError, match=expected), explain_failure(config):
        raise error


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another"), explain_failure(TrainConfig(out=tmp_path)):
        raise RuntimeError("another")


def test_keeping_freed_memory_may_be_asked_for_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    keep_freed_memory()
    monkeypatch.setattr("sys.platform", "linux")  # one without glibc

    tried = []

    def missing(name: str) -> None:
        tried.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    keep_freed_memory()
    assert tried == ["libc.so.6"]
