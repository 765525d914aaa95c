"""Checkpoints: OUT/step-N/, each whole or not there at all, and OUT/latest pointing to the last.

A checkpoint is a folder that is used as it is (`sample.py --model OUT/latest`, and OUT means the
same). To resume from there are, beside the model, `training.safetensors`, with weights, averages
and AdamW's moments by KIND/NAME, and `state.pt`, with the rest.
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


def save_checkpoint(
    out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], keep: int = 1
) -> Path:
    """Write OUT/step-N and move OUT/latest there; a crash midway leaves the last one as it was.

    Args:
        state: what resuming needs, but for what `write` writes; tensors, numbers and strings only.
        write: writes all other files into the folder that it is given.
        keep: how many checkpoints stay; older ones are removed once the new one is whole.

    Raises: ValueError where the disk is full, or cannot be written to for another reason.
    """
    try:
        return _save(out, step, state, write, keep)
    except (OSError, SafetensorError) as error:
        _sweep(out)  # what is half written would only keep the disk full
        last = os.readlink(out / "latest") if (out / "latest").is_symlink() else "none"
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"the checkpoint of step {step} could not be written to {out}: {why}. The last "
            f"one, whole, is {last}; make room (--keep 1 keeps one), and the same command goes on "
            "from there"
        ) from error


def _save(
    out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], keep: int
) -> Path:
    folder = out / f"step-{step}"
    partial = out / f".step-{step}.partial"
    _sweep(out)
    partial.mkdir(parents=True)
    write(partial)
    packed = io.BytesIO()  # torch would hide why a file could not be written
    torch.save({"step": step, **state}, packed)
    (partial / STATE_NAME).write_bytes(packed.getbuffer())
    for written in (*partial.rglob("*"), partial):
        _reach_disk(written)  # before the old one goes: the power may fail
    _put_away(folder)
    os.replace(partial, folder)
    link = out / ".latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, out / "latest")
    _reach_disk(out)
    others = [f for f in out.glob("step-*") if f != folder and f.name[5:].isdecimal()]
    for old in sorted(others, key=lambda f: int(f.name[5:]))[: max(0, len(others) + 1 - keep)]:
        _put_away(old)
    _sweep(out)
    return folder


def _reach_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # which has no such thing
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_away(folder: Path) -> None:
    """Have a checkpoint swept next, so that it is never there by half."""
    if folder.exists():
        os.replace(folder, folder.with_name(f".{folder.name}.old.partial"))


def _sweep(out: Path) -> None:
    """Remove what was not wholly written, or removed, when a run was killed."""
    for left in out.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def load_checkpoint(out: Path) -> dict[str, Any] | None:
    """Read the latest state in `out`, or None where no training has begun."""
    path = out / "latest" / STATE_NAME
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged and cannot be resumed from ({error}); give another --out"
        ) from error
