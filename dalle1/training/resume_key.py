"""The settings that a resumed training must share with its checkpoint."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from dalle1.training.config import TrainConfig

MAY_CHANGE = {
    *("out", "device", "steps", "num_workers", "tensorboard", "wandb", "max_bad_fraction"),
    *("log_every", "validate_every", "save_every", "keep"),
    *("accumulate", "zero", "offload", "weights", "deepspeed"),
}
"""Settings that may change on resuming: none of them changes what was learned so far."""

RENAMED = {
    "crops_per_picture": "crops_per_image",
    "soften": "random_blur",
    "validation_pictures": "validation_images",
}
"""Old → new names of settings, dotted where nested, so that old checkpoints can be resumed."""


def resume_key(config: TrainConfig) -> dict[str, str]:
    """Return the settings that a resumed training must share, by dotted name."""
    return {
        name: value for name, value in _flat(config) if name.partition(".")[0] not in MAY_CHANGE
    }


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", str(value)


def changed_settings(stored: Mapping[str, str], config: TrainConfig) -> list[str]:
    """Return a line for each setting that differs from the key in a checkpoint.

    A setting that did not exist when the checkpoint was written may have any value now.
    """
    now = resume_key(config)
    then = {**now, "optimizer": "adamw", **_upgraded(stored)}
    return [f"{k} was {then[k]} and is {now[k]}" for k in now if then[k] != now[k]]


def _upgraded(stored: Mapping[str, str]) -> dict[str, str]:
    """Return a stored key under today's names; once a nested config was stored as its repr."""
    flat: dict[str, str] = {}
    for name, value in stored.items():
        try:
            node: ast.expr | None = ast.parse(value, mode="eval").body
        except SyntaxError:
            node = None
        flat.update(_leaves(name, node) if isinstance(node, ast.Call) else {name: value})
    return {RENAMED.get(name, name): value for name, value in flat.items()}


def _leaves(name: str, node: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            yield from _leaves(f"{name}.{keyword.arg}", keyword.value)
    else:
        constant = isinstance(node, ast.Constant)
        yield name, str(node.value) if constant else ast.unparse(node)  # type: ignore[attr-defined]
