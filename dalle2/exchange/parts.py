"""One part of a diffusers pipeline: its files, and tables of names."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle1.config import check_types
from dalle1.empty_modules import without_storage
from dalle1.json_files import parse_json
from dalle1.locking import LOCK_NAME, folder_lock
from dalle1.model_files import check_model_files
from dalle1.storage import (
    atomic_path,
    refuse_impossible_sizes,
    write_atomic,
)

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
Module = TypeVar("Module", bound=nn.Module)
Renames = Iterable[tuple[str, Sequence[str]]]
"""(our module, theirs): one, or several whose matrices are stacked here."""


def both(state: Mapping[str, Tensor], name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight and the bias of a module that a state dict has."""
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in state:
            yield kind, state[f"{name}.{kind}"]


def to_theirs(state: Mapping[str, Tensor], names: Renames) -> dict[str, Tensor]:
    """Return our tensors by their names."""
    found: dict[str, Tensor] = {}
    for ours, theirs in names:
        for kind, x in both(state, ours):
            parts = x.chunk(len(theirs))
            found |= {f"{name}.{kind}": part for name, part in zip(theirs, parts, strict=True)}
    return found


def to_ours(
    state: Mapping[str, Tensor], names: Renames, others: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return their tensors by our names; KeyError for one that has none, nor is one of `others`."""
    found: dict[str, Tensor] = {}
    unread = state.keys() - set(others)
    for ours, theirs in names:
        for kind, _ in both(state, theirs[0]):
            read = [f"{name}.{kind}" for name in theirs]
            found[f"{ours}.{kind}"] = torch.cat([state[name] for name in read])
            unread = unread - set(read)
    if unread:
        raise KeyError(f"no such tensors here: {', '.join(sorted(unread)[:3])}")
    return found


def write_part(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one part: its config and its tensors."""
    write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    with atomic_path(folder / WEIGHTS) as path:
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, {"format": "pt"})


def read_part(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read one part; ValueError where it is missing, damaged, or leads out of its folder."""
    check_model_files(folder)
    try:
        config = parse_json(folder / CONFIG, dict)
        tensors = load_file(folder / WEIGHTS)
        return config, {name: x.float() for name, x in tensors.items()}
    except Exception as error:  # damage can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder} holds no part of a diffusers model ({reason}); expected {CONFIG} and "
            f"{WEIGHTS} there"
        ) from error


def build(model: Callable[[Any], Module], config: Any, theirs: Mapping[str, Tensor]) -> Module:
    """Build a model without storage for its parameters, if a part of its size can be.

    Raises: ValueError for a config with wrong types, or of more modules than `theirs` has tensors.
    """
    check_types(config)
    size = sum(x.nbytes for x in theirs.values())
    refuse_impossible_sizes(config, size, len(theirs))
    with without_storage():
        return model(config)


def fill(model: Module, state: Mapping[str, Tensor]) -> Module:
    """Return a model with these parameters, in eval mode."""
    model.load_state_dict(state, assign=True)
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


@contextmanager
def one_architecture(folder: Path) -> Iterator[None]:
    """Turn whatever a wrong config or wrong tensors cause into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # wrong values fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} holds another architecture than expected ({reason})") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Lock `folder`, and yield an unfinished folder in it, whose content moves up in the end.

    Raises: ValueError where `folder` is not empty, also in the end: nothing there is replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a new folder")
    with folder_lock(folder):
        _refuse_content(folder)
        with tempfile.TemporaryDirectory(prefix=".new.", dir=folder) as made:
            yield Path(made)
            _refuse_content(folder, Path(made).name)
            moved: list[Path] = []
            try:
                for path in Path(made).iterdir():
                    moved.append(folder / path.name)
                    os.rename(path, moved[-1])
            except BaseException:  # a part of a model could pass for a whole one
                for path in moved:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                raise


def _refuse_content(folder: Path, *but: str) -> None:
    """Raise ValueError where a folder has any content but these names and its lock."""
    for path in folder.iterdir():
        if path.name not in (*but, LOCK_NAME):
            raise ValueError(f"{folder} holds {path.name}, expected a new or empty folder")


def refuse(config: Any, checks: Iterable[tuple[str, bool, str]]) -> None:
    """Raise ValueError for the first (name, fits, expected) of a config that does not fit."""
    for name, fits, expected in checks:
        if not fits:
            raise ValueError(
                f"{name} is {getattr(config, name)}, expected {expected} in a model for "
                "diffusers; train another"
            )


def refuse_values(folder: Path, config: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Raise ValueError for a part whose config has another value than ours, which is theirs, too.

    Args:
        usual: name → the only value, also of each level, which a config without it has.
    """
    for name, value in usual.items():
        found = config.get(name, value)
        all_found = found if isinstance(found, list) and found else [found]
        if any(x != value for x in all_found):
            raise ValueError(f"{folder} has {name} {found}, expected {value}: ours has no other")
