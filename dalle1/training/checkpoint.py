"""Checkpoints: folders OUT/step-N/, each complete or absent; resuming takes the newest whole one.

A checkpoint is a usable model (`dalle1 sample --model OUT`). For resuming it also holds
`training.safetensors`, with parameters, their averages and optimizer moments as KIND/NAME, and
`state.pt`, with the rest. `checkpoint.json` lists all files, so that partial copies are recognised.
OUT/latest links to the newest one where the file system has links; nothing needs that link.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError

from dalle1.model_files import check_model_files
from dalle1.storage import TRAINING_FILES, checkpoints, missing_from, write_manifest

TENSORS_NAME, STATE_NAME = TRAINING_FILES

RENAMED = {"recipe": "resume_key", "place": "data_state", "scales": "scaler"}
"""Old → new names in `state.pt`."""

STATE_TYPES: dict[str, Any] = {
    "step": int,
    "resume_key": dict,
    "contents": (dict, NoneType),
    "updates": (int, float),
    "data_state": (dict, NoneType),
    "counts": (dict, NoneType),
}
"""Name in `state.pt` → its type; earlier versions wrote fewer."""

RENAMED_COUNTS = {
    "left out/": "skipped/",
    "not a picture": "not an image",
    "damaged picture": "damaged image",
    "no picture": "no image",
}
"""Old → new parts of the names of counts in `state.pt`."""


REMEDIES = {
    errno.ENOSPC: "free disk space (--keep 1 keeps one checkpoint)",
    errno.EDQUOT: "free space in your quota (--keep 1 keeps one checkpoint)",
    errno.EFBIG: "use a file system or a limit (ulimit -f) that takes files of this size",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
}
"""Error number of a failed write → what to do."""


def save_checkpoint(
    out: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], keep: int = 1
) -> Path:
    """Write OUT/step-N; a crash midway leaves the last checkpoint intact.

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
        why, remedy = explain_write_error(error)
        raise ValueError(
            f"the checkpoint of step {step} could not be written to {out}: {why}. "
            f"{last_checkpoint(out)}; {remedy}, then the same command resumes from it"
        ) from error


def explain_write_error(error: Exception) -> tuple[str, str]:
    """Return why a file could not be written, and what to do."""
    number = getattr(error, "errno", None)
    if found := re.search(r"os error (\d+)", str(error)):  # safetensors has it in its message
        number = int(found[1])
    why = os.strerror(number) if number else str(error)
    return why, REMEDIES.get(number or 0, "remove the cause")


def last_checkpoint(out: Path) -> str:
    """Return a sentence that names the newest whole checkpoint."""
    whole = (f for f in checkpoints(out) if missing_from(f, training=True) is None)
    name = next(whole, None)
    return f"The last whole checkpoint is {name if name else 'none: none was written yet'}"


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
    write_manifest(partial, step)
    for written in (*partial.rglob("*"), partial):
        _flush(written)  # before the old checkpoint is removed: the power may fail
    if folder.exists():
        (_set_aside if missing_from(folder, training=True) else _retire)(folder)
    os.replace(partial, folder)
    _link_latest(out, folder)
    _flush(out)
    # Incomplete ones were not written by this run: something else removed files from them.
    found = checkpoints(out)  # newest first; a newer one is damaged, and may still be repaired
    earlier = found[found.index(folder) + 1 :]
    for old in [f for f in earlier if missing_from(f, training=True) is None][keep - 1 :]:
        _retire(old)
    _remove_partial(out)
    return folder


def _link_latest(out: Path, folder: Path) -> None:
    """Point OUT/latest to a checkpoint; without it where the file system has no links."""
    link, partial = out / "latest", out / ".latest.partial"
    if link.is_dir() and not link.is_symlink():
        _set_aside(link)  # a copy that a sync made of the folder behind the link
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder.name)
        os.replace(partial, link)
    except (OSError, NotImplementedError):
        with suppress(OSError):  # an old link would point to an old checkpoint
            link.unlink(missing_ok=True)


def _set_aside(folder: Path) -> None:
    """Rename a folder that this run did not write, so that it is no checkpoint any more."""
    names = (folder.with_name(f"{folder.name}.replaced{n or ''}") for n in count())
    os.replace(folder, next(name for name in names if not name.exists()))


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk (fsync)."""
    if path.is_dir():  # Windows and some network drives cannot flush folders
        with suppress(OSError):
            _fsync(path, os.O_RDONLY)
    else:
        _fsync(path, os.O_RDWR)


def _fsync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
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


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    state: dict[str, Any]
    """Contents of its `state.pt`."""
    skipped: list[str]
    """Newer checkpoints that are incomplete, each with the reason."""


def find_checkpoint(out: Path) -> Checkpoint | None:
    """Load the state of the newest whole checkpoint in `out`; None where there is no checkpoint.

    Raises: ValueError where there are checkpoints, and each is incomplete or damaged; or files are
        pipes or links out of the folder.
    """
    check_model_files(out)  # its log
    skipped: list[str] = []
    for folder in checkpoints(out):
        missing = missing_from(folder, training=True)
        if missing is None:
            try:
                return Checkpoint(folder, read_state(folder / STATE_NAME), skipped)
            except Exception:  # damaged bytes cause errors of any kind
                missing = f"{STATE_NAME} is damaged"
        skipped.append(f"{folder.name} ({missing})")
    if skipped:
        raise ValueError(
            f"{out} holds no whole checkpoint to resume from: {', '.join(skipped)}. Copy the "
            "missing files again, or use another --out to start at step 0"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Read a `state.pt`, also of earlier versions."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {RENAMED.get(name, name): value for name, value in state.items()}
    for name, value in {"step": None, **state}.items():
        kind = STATE_TYPES.get(name, object)
        if not isinstance(value, kind):
            raise ValueError(f"its {name} is a {type(value).__name__}")
    if not all(isinstance(value, str) for value in state.get("resume_key", {}).values()):
        raise ValueError("its resume_key holds no texts")
    counts = state.get("counts") or {}
    state["counts"] = {_present_count(name): count for name, count in counts.items()}
    return state


def load_checkpoint(out: Path) -> dict[str, Any] | None:
    """Return the state of the newest whole checkpoint in `out`; None without any."""
    found = find_checkpoint(out)
    return found.state if found else None
