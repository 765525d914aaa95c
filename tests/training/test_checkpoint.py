"""Checkpoints: each whole or not there at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from function_task import FunctionTask
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from two_processes import SIZE, config_for, loss

from dalle1.model.transformer import Transformer
from dalle1.storage import MANIFEST_NAME, model_folder, write_manifest
from dalle1.training import checkpoint
from dalle1.training.checkpoint import (
    STATE_NAME,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
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
        ValueError,
        match=r"step 20 .* No space left on device. The last .* is .*step-10; free disk space",
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


# Copies of a run by other programs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training's folder with the whole checkpoints step-2, step-4 and step-6."""
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, {"resume_key": {}}, save_model, keep=3)
    return tmp_path


def save_model(folder: Path) -> None:
    (folder / "raw").mkdir()
    for name in ("model", "raw/model", "training"):
        save_file({"x": torch.ones(3)}, folder / f"{name}.safetensors")


def steps(run: Path) -> list[str]:
    return sorted(f.name for f in run.iterdir() if f.is_dir() and not f.is_symlink())


def dangle(run: Path) -> None:
    (run / "latest").unlink()
    (run / "latest").symlink_to("step-9")


def copy_instead_of_link(run: Path) -> None:
    (run / "latest").unlink()
    shutil.copytree(run / "step-4", run / "latest")


@pytest.mark.parametrize(
    "change",
    [lambda run: (run / "latest").unlink(), dangle, copy_instead_of_link],
    ids=["no link", "dangling link", "copy of an older one"],
)
def test_the_newest_checkpoint_needs_no_link(run: Path, change: Callable[[Path], None]) -> None:
    change(run)
    assert find_checkpoint(run).folder == run / "step-6"
    for path in (run, run / "latest"):
        assert model_folder(path) == run / "step-6"
    assert model_folder(run / "latest/raw") == run / "step-6/raw"
    save_checkpoint(run, 8, {}, save_model, keep=2)
    assert {"step-6", "step-8"} <= {*steps(run)}
    assert model_folder(run / "latest") == (run / "latest").resolve() == run / "step-8"


def test_a_copy_of_latest_alone_is_a_checkpoint(run: Path) -> None:
    copy_instead_of_link(run)
    for step in (2, 4, 6):
        shutil.rmtree(run / f"step-{step}")
    assert find_checkpoint(run).state["step"] == 4
    assert model_folder(run) == run / "latest"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zero_part(path: Path) -> None:
    """Leave what the power leaves of a file whose last pages were not yet written."""
    content = bytearray(path.read_bytes())
    content[64:-600] = bytes(len(content) - 664)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("state.pt", zero_part, "state.pt is damaged"),
        ("state.pt", Path.unlink, "state.pt is missing"),
        ("state.pt", cut, r"state.pt has \d+ bytes, expected \d+"),
        ("state.pt", zero, "state.pt is damaged"),
        ("training.safetensors", Path.unlink, "training.safetensors is missing"),
        ("training.safetensors", zero, "training.safetensors is damaged"),
        ("raw/model.safetensors", Path.unlink, "raw/model.safetensors is missing"),
        ("model.safetensors", cut, r"model.safetensors has \d+ bytes, expected \d+"),
    ],
)
@pytest.mark.parametrize("manifest", [True, False])
def test_an_incomplete_checkpoint_is_passed_over_and_kept(
    run: Path, name: str, damage: Callable[[Path], None], reason: str, manifest: bool
) -> None:
    for folder in run.glob("step-*"):
        if not manifest:  # earlier versions wrote none
            (folder / "checkpoint.json").unlink()
    damage(run / "step-6" / name)
    if not manifest and damage is Path.unlink and name == "raw/model.safetensors":
        pytest.skip("without the list of files nothing shows that one is missing")
    kept = (run / "step-6/model.safetensors").stat().st_size if name != "model.safetensors" else 0
    found = find_checkpoint(run)
    assert found.state["step"] == 4
    (skipped,) = found.skipped
    reason = reason if manifest else rf"{reason.partition(' has')[0]}( is damaged)?"
    assert re.match(rf"step-6 \({reason}", skipped)
    for step in (6, 8):
        save_checkpoint(run, step, {}, save_model, keep=1)
    assert steps(run) == ["step-6.replaced", "step-8"]
    if kept:
        assert (run / "step-6.replaced/model.safetensors").stat().st_size == kept


def test_a_checkpoint_without_training_files_is_a_model(run: Path) -> None:
    for name in ("state.pt", "training.safetensors"):
        (run / "step-6" / name).unlink()
    assert model_folder(run) == run / "step-6"
    assert find_checkpoint(run).state["step"] == 4
    (run / "step-6/model.safetensors").unlink()
    with pytest.warns(UserWarning, match="step-6 is incomplete .*: step-4 is loaded instead"):
        assert model_folder(run) == run / "step-4"


def test_only_incomplete_checkpoints_are_an_error(run: Path) -> None:
    for step in (2, 4, 6):
        (run / f"step-{step}/state.pt").unlink()
    with pytest.raises(ValueError, match=r"no whole .*: step-6 \(state.pt is missing\), step-4"):
        find_checkpoint(run)


def test_a_damaged_newer_checkpoint_costs_no_whole_one(run: Path) -> None:
    zero_part(run / "step-6/state.pt")
    assert find_checkpoint(run).state["step"] == 4
    save_checkpoint(run, 5, {}, save_model, keep=1)
    assert steps(run) == ["step-5", "step-6"]
    assert find_checkpoint(run).state["step"] == 5
    assert (run / "latest").resolve() == run / "step-5"


def test_file_systems_that_cannot_flush_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    save_checkpoint(tmp_path, 1, {}, save_model)
    assert find_checkpoint(tmp_path).state["step"] == 1


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "refused"), NotImplementedError()])
def test_file_systems_without_links(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, "symlink", refuse)
    save_checkpoint(run, 8, {"resume_key": {}}, save_model)
    assert {f.name for f in run.iterdir()} == {"step-8"}  # and no link to one that is gone
    assert find_checkpoint(run).folder == model_folder(run / "latest") == run / "step-8"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EROFS, ""), "Read-only file system.*make the file system writable"),
        (OSError(errno.EDQUOT, ""), "Disk quota exceeded.*free space in your quota"),
        (SafetensorError("I/O error: x (os error 28)"), "No space left.*free disk space"),
        (SafetensorError("nonsense"), "nonsense.*remove the cause"),
    ],
)
def test_a_failed_write_is_explained(run: Path, error: Exception, says: str) -> None:
    def fail(folder: Path) -> None:
        raise error

    with pytest.raises(ValueError, match=says):
        save_checkpoint(run, 8, {}, fail)


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


@pytest.mark.parametrize(
    "change", [{"step": "5"}, {"resume_key": []}, {"resume_key": {"seed": 0}}, {"counts": 3}]
)
def test_a_state_of_other_types_costs_no_earlier_checkpoint(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    save_checkpoint(tmp_path, 4, {"resume_key": {"seed": "0"}}, write_name("a"), keep=2)
    folder = save_checkpoint(tmp_path, 5, {"resume_key": {"seed": "0"}}, write_name("a"), keep=2)
    (folder / MANIFEST_NAME).unlink()
    torch.save({"step": 5, "resume_key": {}, **change}, folder / STATE_NAME)
    write_manifest(folder, 5)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.state["step"], found.skipped) == (4, ["step-5 (state.pt is damaged)"])
