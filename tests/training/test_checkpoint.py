"""Checkpoints: each whole or not there at all."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from function_task import FunctionTask
from safetensors.torch import load_file, save_file
from two_processes import SIZE, config_for, loss

from dalle1.model.transformer import Transformer
from dalle1.storage import model_folder
from dalle1.training import checkpoint
from dalle1.training.checkpoint import load_checkpoint, save_checkpoint
from dalle1.training.engines.ddp import DDPEngine


def write_name(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.txt").write_text(name) and None


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, {"x": torch.ones(2)}, write_name("ten"))

    def crash(folder: Path) -> None:
        (folder / "model.txt").write_text("half of twen")
        raise RuntimeError("disk full")

    for step in (20, 10):
        with pytest.raises(RuntimeError, match="disk full"):
            save_checkpoint(tmp_path, step, {"x": torch.zeros(2)}, crash)
        state = load_checkpoint(tmp_path)
        assert state is not None
        assert state["step"] == 10
        assert state["x"].tolist() == [1, 1]
        assert (model_folder(tmp_path) / "model.txt").read_text() == "ten"
        assert [f.name for f in tmp_path.glob("step-*")] == ["step-10"]
    save_checkpoint(tmp_path, 20, {"x": torch.zeros(2)}, write_name("twenty"))
    assert (model_folder(tmp_path) / "model.txt").read_text() == "twenty"
    assert {f.name for f in tmp_path.iterdir()} - {".step-10.partial"} == {"latest", "step-20"}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, {}, write_name("ten"))

    def fill(folder: Path) -> None:
        (folder / "model.txt").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        ValueError, match=r"step 20 .* No space left on device. .* complete one is step-10"
    ):
        save_checkpoint(tmp_path, 20, {}, fill)
    assert {f.name for f in tmp_path.iterdir()} == {
        "latest",
        "step-10",
    }
    assert load_checkpoint(tmp_path) == {"step": 10, "counts": {}}


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [25]), (2, [20, 25]), (4, [10, 15, 20, 25]), (9, [5, 10, 15, 20, 25])]
)
def test_keep(tmp_path: Path, keep: int, kept: list[int]) -> None:
    for step in (5, 10, 15, 20, 25):
        folder = save_checkpoint(tmp_path, step, {}, write_name("x"), keep=keep)
        assert folder == tmp_path / f"step-{step}"
        assert model_folder(tmp_path) == folder.resolve()
    assert sorted(int(f.name[5:]) for f in tmp_path.glob("step-*")) == kept


def test_a_crash_while_removing_leaves_no_partial_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 10, {}, write_name("ten"))
    remove = checkpoint.shutil.rmtree

    def crash(folder: Path, **how: bool) -> None:
        next(folder.rglob("*.txt")).unlink()
        raise RuntimeError("the power is gone")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", crash)
    with pytest.raises(RuntimeError, match="the power is gone"):
        save_checkpoint(tmp_path, 20, {}, write_name("twenty"))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", remove)
    assert [f.name for f in tmp_path.glob("step-*")] == ["step-20"]
    assert model_folder(tmp_path).name == "step-20"
    save_checkpoint(tmp_path, 30, {}, write_name("thirty"))
    assert {f.name for f in tmp_path.iterdir()} == {"latest", "step-30"}


def test_other_folders_are_kept(tmp_path: Path) -> None:
    (tmp_path / "step-2-good").mkdir()
    for step in (2, 4):
        save_checkpoint(tmp_path, step, {}, lambda folder: None)
    assert sorted(f.name for f in tmp_path.glob("step-*")) == ["step-2-good", "step-4"]


def test_model_folder(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert model_folder(tmp_path) == tmp_path
    assert model_folder(str(tmp_path / "nothing")) == tmp_path / "nothing"
    (tmp_path / "latest").symlink_to("step-3")  # points to nothing
    assert model_folder(tmp_path) == tmp_path
    (tmp_path / "step-3").mkdir()
    assert model_folder(tmp_path) == (tmp_path / "step-3").resolve()


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {}, lambda folder: None)
    state = tmp_path / "latest" / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        load_checkpoint(tmp_path)


def test_parameter_names_of_earlier_versions_are_read(tmp_path: Path) -> None:
    def engine(seed: int) -> DDPEngine[Transformer]:
        torch.manual_seed(seed)
        return DDPEngine(FunctionTask(Transformer(SIZE), loss), config_for(tmp_path))

    one, other = engine(1), engine(2)
    one.save(tmp_path / "new.safetensors")
    old = {}
    for name, tensor in load_file(tmp_path / "new.safetensors").items():
        in_layer = name.replace(".norm.", "_norm.").replace(".branch.", ".")
        old[in_layer if "/layers." in name else name] = tensor
    assert "mean/layers.0.mlp_norm.weight" in old
    save_file(old, tmp_path / "old.safetensors")
    other.load(tmp_path / "old.safetensors")
    assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))
