"""One part of a diffusers pipeline: its files, and tables of names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle1.json_files import parse_json
from dalle1.storage import atomic_path, write_atomic

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
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
    """Read one part; ValueError where it is missing or damaged."""
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
        usual: name → the only value, which is also that of a config without it.
    """
    for name, value in usual.items():
        if (found := config.get(name, value)) != value:
            raise ValueError(f"{folder} has {name} {found}, expected {value}: ours has no other")


def other_architecture(folder: Path, error: Exception) -> ValueError:
    """Return the error of a part whose tensors are those of another model."""
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{folder} holds another architecture than expected ({reason})")
