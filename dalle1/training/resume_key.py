"""The settings that a resumed training must share with its checkpoint."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from dalle1.data.sources.base import Source
from dalle1.tensor_files import index_of, quick_digest
from dalle1.training.config import TrainConfig

MAY_CHANGE = {
    *("out", "device", "steps", "num_workers", "tensorboard", "wandb", "max_bad_fraction"),
    *("log_every", "validate_every", "save_every", "keep"),
    *("accumulate", "zero", "offload", "weights", "deepspeed", "checkpointing", "prompts"),
    "sampling_steps",
}
"""Settings that may change on resuming: none of them changes what was learned so far."""

PATHS = ("data", "dvae", "init", "hard_negatives", "autoencoder", "clip", "text_encoders")
"""Settings that are compared by what is found behind them."""

Contents = Mapping[str, int | str | None]
"""What identifies the content behind a path: `digest`, and for data the number of `samples`."""

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


def contents_of(data: Source, **files: Path | None) -> dict[str, Contents]:
    """Return what identifies the data and model files, wherever they are, by setting."""
    found: dict[str, Contents] = {"data": {"samples": data.size, "digest": data.digest()}}
    for name, file in files.items():
        if file is not None and (file.is_file() or index_of(file).is_file()):
            found[name] = {"digest": quick_digest(file)}
    return found


OF_EARLIER_VERSIONS = {"optimizer": "adamw", "sample_codes": "False"}
"""Settings that did not exist, and what all trainings did then."""


def changed_settings(
    stored: Mapping[str, str],
    config: TrainConfig,
    stored_contents: Mapping[str, Contents] | None = None,
    contents: Mapping[str, Contents] | None = None,
) -> list[str]:
    """Return a line for each setting that differs from the key in a checkpoint.

    A setting that did not exist when the checkpoint was written may have any value now, unless
    it is in `OF_EARLIER_VERSIONS`. A path may change where the same is found behind it.

    Args:
        stored_contents: what was found behind the paths, by the setting's name; and now `contents`.
    """
    now = resume_key(config)
    then = {**now, **OF_EARLIER_VERSIONS, **_upgraded(stored)}
    changed = []
    for name in now:
        before, after = ((all_of or {}).get(name) for all_of in (stored_contents, contents))
        if name not in PATHS:
            same = then[name] == now[name]
        elif before and after and (before == after or name not in ("data", "init")):
            same = before == after
        else:
            same = then[name] == now[name] or _same_path(then[name], now[name])
        if not same and then[name] == now[name]:
            changed.append(f"{name}, {now[name]}, is another file than before")
        elif not same:
            was, now_is = f"{then[name]}{_count(before)}", f"{now[name]}{_count(after)}"
            changed.append(f"{name} was {was} and is {now_is}")
    return changed


def _count(contents: Contents | None) -> str:
    return f" ({contents['samples']} samples)" if contents and contents.get("samples") else ""


def changed_data(before: Contents | None, after: Contents | None) -> str | None:
    """Return a line about data that is not the same as in the checkpoint; None where it is."""
    if not before or not after or before == after:
        return None
    then, now = before["samples"], after["samples"]
    if then != now:
        change = f"{then or 'a stream'} samples then, {now or 'a stream'} now"
    else:
        change = f"{now} samples, some of other names" if now else "other shards"
    return f"The data changed since the checkpoint: {change}. The resumed training is not exact"


def _same_path(one: str, other: str) -> bool:
    """Whether two paths mean the same file or folder, such as `data` and `./data/`."""
    first, second = (os.path.realpath(os.path.expanduser(path)) for path in (one, other))
    return first == second


def _upgraded(stored: Mapping[str, str]) -> dict[str, str]:
    """Return a stored key under today's names; once a nested config was stored as its repr."""
    flat: dict[str, str] = {}
    for name, value in stored.items():
        node: ast.expr | None = None
        if name not in PATHS:  # `photos(1)` is a folder
            with suppress(SyntaxError):
                node = ast.parse(value, mode="eval").body
        flat.update(_leaves(name, node) if isinstance(node, ast.Call) else {name: value})
    return {RENAMED.get(name, name): value for name, value in flat.items()}


def _leaves(name: str, node: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            yield from _leaves(f"{name}.{keyword.arg}", keyword.value)
    else:
        constant = isinstance(node, ast.Constant)
        yield name, str(node.value) if constant else ast.unparse(node)  # type: ignore[attr-defined]
