"""Checkpoints: folders OUT/step-N/, each complete or absent; OUT/latest links to the last one.

A checkpoint is a usable model (`sample.py --model OUT/latest`, or just OUT). For resuming it also
holds `training.safetensors`, with parameters, their averages and optimizer moments as KIND/NAME,
and `state.pt`, with the rest.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

STATE_NAME = "state.pt"
TENSORS_NAME = "training.safetensors"

RENAMED = {"recipe": "resume_key", "place": "data_state", "scales": "scaler"}
"""Old → new names in `state.pt`."""

RENAMED_COUNTS = {
    "left out/": "skipped/",
    "not a picture": "not an image",
    "damaged picture": "damaged image",
    "no picture": "no image",
}
"""Old → new parts of the names of counts in `state.pt`."""


def save_checkpoint(
    out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], keep: int = 1
) -> Path:
    """Write OUT/step-N and point OUT/latest to it; a crash midway leaves the last one intact.

    Args:
        state: contents of `state.pt`: tensors, numbers and strings only.
        write: function that writes all other files into a folder.
        keep: number of checkpoints to keep; older ones are removed once the new one is complete.

    Raises: ValueError where the disk is full, or cannot be written for another reason.
    """
    try:
        return _save(out, step, state, write, keep)
    except (OSError, SafetensorError) as error:
        _remove_partial(out)  # a partial checkpoint would only fill the disk
        last = os.readlink(out / "latest") if (out / "latest").is_symlink() else "none"
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"the checkpoint of step {step} could not be written to {out}: {why}. The last "
            f"complete one is {last}; free disk space (--keep 1 keeps one checkpoint), then the "
            "same command resumes from it"
        ) from error


def _save(
    out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], keep: int
) -> Path:
    folder = out / f"step-{step}"
    partial = out / f".step-{step}.partial"
    _remove_partial(out)
    partial.mkdir(parents=True)
    write(partial)
    packed = io.BytesIO()  # torch.save to a file would hide the reason of a failure
    torch.save({"step": step, **state}, packed)
    (partial / STATE_NAME).write_bytes(packed.getbuffer())
    for written in (*partial.rglob("*"), partial):
        _flush(written)  # before the old checkpoint is removed: the power may fail
    _retire(folder)
    os.replace(partial, folder)
    link = out / ".latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, out / "latest")
    _flush(out)
    others = [f for f in out.glob("step-*") if f != folder and f.name[5:].isdecimal()]
    for old in sorted(others, key=lambda f: int(f.name[5:]))[: max(0, len(others) + 1 - keep)]:
        _retire(old)
    _remove_partial(out)
    return folder


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk (fsync)."""
    if path.is_dir() and os.name == "nt":  # Windows cannot flush folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _retire(folder: Path) -> None:
    """Rename a checkpoint for removal, so that it never exists in part."""
    if folder.exists():
        os.replace(folder, folder.with_name(f".{folder.name}.old.partial"))


def _remove_partial(out: Path) -> None:
    """Remove checkpoints that a killed run left partly written or partly removed."""
    for left in out.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _present_count(name: str) -> str:
    for old, new in RENAMED_COUNTS.items():
        name = name.replace(old, new)
    return name


def load_checkpoint(out: Path) -> dict[str, Any] | None:
    """Load the latest `state.pt` in `out`, also of earlier versions; None without any."""
    path = out / "latest" / STATE_NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged and cannot be resumed from ({error}); use another --out"
        ) from error
    state = {RENAMED.get(name, name): value for name, value in state.items()}
    counts = state.get("counts", {})
    state["counts"] = {_present_count(name): count for name, count in counts.items()}
    return state
