"""Checkpoints of earlier versions are resumed to the last digit, under today's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from function_task import FunctionTask
from two_processes import SIZE, loss, stream

from dalle1.data.crops import Augmentation
from dalle1.model.transformer import Transformer
from dalle1.training import resume_key as keys
from dalle1.training.config import TrainConfig, resolve_precision
from dalle1.training.loop import fit
from dalle1.training.resume_key import changed_settings, resume_key


@dataclass(frozen=True, kw_only=True)
class NestedConfig(TrainConfig):
    augmentation: Augmentation = field(default_factory=Augmentation)


class Endless:
    """A stream that needs a cursor to be resumed, as streamed shards do."""

    def __init__(self) -> None:
        self.cursor = 0

    def batches(self, start: int) -> Iterator[object]:
        for batch in FunctionTask(torch.nn.Linear(1, 1), loss, stream).loader.batches(self.cursor):
            self.cursor += 1
            yield batch

    def state_dict(self) -> dict[str, object]:
        return {"readers": 1, "cursors": {0: [self.cursor]}}

    def load_state_dict(self, state: dict[str, dict[int, list[int]]]) -> None:
        self.cursor = state["cursors"][0][0]


def train(out: Path, steps: int) -> list[float]:
    torch.manual_seed(0)
    task = FunctionTask(Transformer(SIZE), loss, save=Transformer.save)
    task.loader = Endless()
    settings = {"device": "cpu", "precision": "fp32", "log_every": 1, "schedule": "plateau"}
    fit(task, NestedConfig(out=out, steps=steps, batch_size=8, schedule_steps=4, **settings))
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["total"] for line in lines if "total" in line]


def write_as_before(out: Path) -> None:
    """Rewrite the state in a checkpoint as earlier versions wrote it."""
    path = out / "latest" / "state.pt"
    state = torch.load(path, weights_only=True)
    key = {k: v for k, v in state.pop("resume_key").items() if not k.startswith("augmentation.")}
    state["recipe"] = {**key, "augmentation": str(Augmentation())}
    state["place"] = state.pop("data_state")
    state["counts"] = {"left out/too small": 3, "left out/not a picture": 2}
    torch.save(state, path)
    path.with_name("checkpoint.json").unlink()


def test_an_old_checkpoint_is_resumed_to_the_last_digit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    write_as_before(tmp_path / "parts")
    assert train(tmp_path / "parts", 4) == whole
    last = (tmp_path / "parts/log.jsonl").read_text().splitlines()[-2]
    assert json.loads(last)["skipped/too small"] == 3
    assert json.loads(last)["skipped/not an image"] == 2
    one, other = (tmp_path / run / "latest/training.safetensors" for run in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()
    shutil.rmtree(tmp_path / "parts")


def test_nested_settings_of_an_old_checkpoint_are_compared(tmp_path: Path) -> None:
    config = NestedConfig(out=tmp_path, augmentation=Augmentation(resize=(1.0, 2.0)))
    stored = {**resume_key(config), "augmentation": str(Augmentation(resize=(1.0, 3.0)))}
    del stored["augmentation.resize"]
    assert changed_settings(stored, config) == [
        "augmentation.resize was (1.0, 3.0) and is (1.0, 2.0)"
    ]
    stored["augmentation"] = "OldName(resize=(1.0, 2.0), gone=-1)"
    assert changed_settings(stored, config) == []


def test_renamed_settings_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(keys.RENAMED, "old_seed", "seed")
    config = TrainConfig(out=tmp_path)
    stored = resume_key(config)
    stored["old_seed"] = stored.pop("seed")
    assert changed_settings(stored, config) == []
    assert changed_settings(stored, replace(config, seed=7)) == ["seed was 0 and is 7"]


def test_a_resumed_training_keeps_the_precision_of_its_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "run", 1)
    path = tmp_path / "run" / "latest" / "state.pt"
    path.with_name("checkpoint.json").unlink()
    state = torch.load(path, weights_only=True)
    device = torch.device("cpu")
    for stored in ("bf16", "fp32"):  # one of them is not what this processor would choose
        state["resume_key"]["precision"] = stored
        torch.save(state, path)
        config = TrainConfig(out=tmp_path / "run")
        assert resolve_precision(config, device).precision == stored
        assert resolve_precision(replace(config, precision="fp32"), device).precision == "fp32"
    halves = TrainConfig(out=tmp_path / "new", zero=1, weights="bf16")
    assert resolve_precision(halves, device).precision == "bf16"
