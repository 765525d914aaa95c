"""One process alone does nothing; a Slurm step is understood; engines' settings are checked."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from function_task import FunctionTask

from dalle1.training import distributed
from dalle1.training.config import TrainConfig
from dalle1.training.engines import make_engine
from dalle1.training.engines.deepspeed import deepspeed_config


def test_without_a_launcher_there_is_one_process() -> None:
    assert distributed.init("cpu") == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    x = torch.ones(2, 3, requires_grad=True)
    assert distributed.gather(x) is x
    assert distributed.mean(x) is x
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    distributed.barrier()
    distributed.shutdown()


def test_a_slurm_step_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"MASTER_ADDR and MASTER_PORT not set, .*slurm\.sh"):
        distributed.init("cpu")
    asked: list[Any] = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **_: asked.append(a))
    found = (torch.distributed.HashStore(), 5, 16)
    monkeypatch.setattr("torch.distributed.rendezvous", lambda *_, **__: iter([found]))
    monkeypatch.setattr(distributed, "Heartbeat", lambda *a: asked.append(a[1:]))
    monkeypatch.setattr(distributed, "_heartbeats", [])
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    distributed.init("cpu")
    assert asked == [("gloo",), (5, 16)]
    assert [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "16", "1"]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launched process that finds a store, which stays."""
    found = (torch.distributed.HashStore(), 0, 1)
    monkeypatch.setattr("torch.distributed.rendezvous", lambda *_, **__: iter([found]))
    monkeypatch.setattr(distributed, "_groups", count())
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "node1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def test_a_process_that_cannot_join_is_not_killed_later(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no group")

    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    with pytest.raises(ValueError, match="no group"):
        distributed.init_process_group("gloo")
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)


def test_a_process_may_join_again_but_no_second_training(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # two groups of one process
        distributed._join()
    monkeypatch.setattr(distributed, "_groups", count())
    with pytest.raises(ValueError, match="more than 1 processes joined at node1:29500"):
        distributed._join()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    distributed._join()  # a worker that replaces another one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": "cpu"}, "--offload cpu needs --zero"),
        ({"weights": "bf16"}, "--weights bf16 needs --zero"),
        ({"weights": "bf16", "zero": 2, "precision": "fp32"}, "and --precision bf16"),
        (
            {"zero": 2, "precision": "fp16"},
            "--precision fp16 scales gradients resblock by resblock",
        ),
        ({"zero": 4}, "zero is 4, expected 0 or 1 or 2 or 3"),
        ({"zero": 1, "deepspeed": Path("x.json")}, "replaces --zero"),
        ({"keep": 0}, "keep is 0, expected at least 1"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(out=tmp_path, **changes)


def test_a_batch_is_shared_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    config = TrainConfig(out=tmp_path, batch_size=8, accumulate=2)
    task = FunctionTask(torch.nn.Linear(1, 1), lambda *_: [])
    with pytest.raises(ValueError, match=r"batch_size is 8, expected a multiple of .* 3 × 2"):
        make_engine(task, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64 in .*, and 32 by --batch-size"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0"),
        ({"optimizer": {"type": "Adam"}}, "optimizer in .* is not supported"),
        ({"fp16": {"enabled": True}}, "fp16 in .* is not supported"),
        ({"zero_optimisation": {}}, "zero_optimisation in .* is not supported"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0 .*, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device is nvme",
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload in .* not supp"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": None}}, "is null in .*, expected"),
        ({"zero_optimization": None}, "zero_optimization is null"),
        ({"zero_force_ds_cpu_optimizer": True}, "asks for DeepSpeed's own AdamW"),
        ({"bf16": True}, "bf16 is true in .*, expected an object"),
        ({"bf16": {"enabled": True}}, "check_grad_overflow"),
        ([1], "mine.json is a list, expected an object"),
    ],
)
def test_a_deepspeed_config_is_honoured_or_refused(
    tmp_path: Path, settings: Any, message: str
) -> None:
    path = tmp_path / "mine.json"
    if isinstance(settings, dict):
        settings = {"zero_optimization": {"stage": 2}, **settings}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        deepspeed_config(TrainConfig(out=tmp_path, deepspeed=path))


def test_a_deepspeed_config_is_passed_on_unchanged(tmp_path: Path) -> None:
    settings = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 4,
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1000},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "wall_clock_breakdown": True,
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(settings))
    got = deepspeed_config(TrainConfig(out=tmp_path, deepspeed=path, accumulate=4, batch_size=16))
    filled = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
    assert got == {**settings, **filled, "gradient_clipping": 4.0}


def test_torch_updates_what_a_deepspeed_config_offloads(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    sharing = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": sharing}))
    got = deepspeed_config(TrainConfig(out=tmp_path, deepspeed=path))
    assert got["zero_optimization"] == sharing
    assert got["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("printed", "requeued"), [("Stopped at step 3", True), ("The model", False)]
)
def test_slurm_is_asked_to_requeue_after_a_signal_only(
    tmp_path: Path, printed: str, requeued: bool
) -> None:
    commands = {
        "srun": f"echo $MASTER_ADDR:$MASTER_PORT \"$@\" > started; echo '{printed}'",
        "scontrol": 'if [ "$1" = show ]; then echo first; else echo "$@" > requeued; fi',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n", "PRESET": "toy"}
    script = Path(__file__).parents[2] / "recipes/slurm.sh"
    command = ["bash", str(script), "--steps", "9"]
    subprocess.run(command, cwd=tmp_path, env={**env, "SLURM_JOB_ID": "20007"}, check=True)
    started = (tmp_path / "started").read_text()
    assert started.startswith("first:20007 ")
    assert "train_transformer.py toy" in started
    assert started.endswith("--steps 9\n")
    assert (tmp_path / "requeued").exists() == requeued
