"""Atomic writes and safetensors files; nothing is unpickled.

A model file holds the parameters and buffers of a model's state dict. Its metadata holds the config
as JSON, and the `kind` of an image tokenizer (see `dalle1.image_tokenizer`).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dalle1.config import check_types
from dalle1.empty_modules import without_storage
from dalle1.json_files import parse_json
from dalle1.model_files import check_model_files, refuse_pointer, unfit_files
from dalle1.tensor_files import (
    MAX_SHARD_BYTES,
    index_of,
    index_text,
    read_tensors,
    shards_of,
    split_into_shards,
    tensor_files,
    write_tensors,
)

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to `path` at the end; removed on an error.

    Its name is unique: processes that write the same file do not share it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file, and its folder; an interruption leaves the old file or the new one."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def claim(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of the results beside `path` as JSON; refuse a folder with other settings.

    Args:
        settings: plain values.

    Raises: ValueError where `path` holds other settings: results of both would be mixed.
    """
    settings = parse_json(json.dumps(settings))
    before = parse_json(path, dict) if path.exists() else settings
    if before != settings:
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        raise ValueError(
            f"{path.parent} holds results of other settings ({', '.join(names)} differ); use "
            "another --out"
        )
    write_atomic(path, json.dumps(settings, indent=1) + "\n")


MANIFEST_NAME = "checkpoint.json"
"""File of a checkpoint that lists the step and the sizes of all other files."""

TRAINING_FILES = ("training.safetensors", "state.pt")
"""Files of a checkpoint that only resuming needs; a model loads without them."""


BUNDLED = Path(__file__).parent / "bundled" / "toybox"
"""Folder of the model that ships with the project."""


def model_folder(directory: str | Path) -> Path:
    """Return the folder with the model: `directory`, or its newest whole checkpoint if it has any.

    "bundled" is the model that ships with the project; a warning tells where a model in the working
    directory is called so, too.

    `latest` in a path stands for the newest whole checkpoint too, whether the link exists or not:
    syncs drop links, and some file systems have none.

    Raises: ValueError where files of it are links out of the folder, pipes or devices.
    """
    path = Path(directory)
    if str(path) == "bundled":
        if any(path.glob("*.safetensors")) or checkpoints(path):
            warnings.warn(
                "bundled is the model that ships with dalle1; for the folder here, write "
                f"{path.absolute()}",
                stacklevel=2,
            )
        path = BUNDLED
    folder = _model_folder(path)
    check_model_files(folder)
    return folder


def _model_folder(path: Path) -> Path:
    for i, part in enumerate(path.parts):
        if part == "latest" and checkpoints(run := Path(*path.parts[:i])):
            return _model_folder(run).joinpath(*path.parts[i + 1 :])
    found = checkpoints(path)
    for checkpoint in found:
        if missing_from(checkpoint) is None:
            if checkpoint != found[0]:
                warnings.warn(
                    f"{found[0]} is incomplete ({missing_from(found[0])}): {checkpoint.name} is "
                    "loaded instead",
                    stacklevel=2,
                )
            return checkpoint.resolve()
    latest = path / "latest"
    if latest.exists():
        return latest.resolve()
    return found[0].resolve() if found else path


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints in a training's folder, whole or not, the newest first.

    They are the folders step-N, and `latest` where a sync copied the folder that it linked to.
    """
    numbered = {f: int(f.name[5:]) for f in run.glob("step-*") if f.name[5:].isdecimal()}
    copied = run / "latest"
    if copied.is_dir() and not copied.is_symlink():
        step = _manifest(copied).get("step")
        numbered[copied] = step if isinstance(step, int) else -1
    return sorted((f for f in numbered if f.is_dir()), key=lambda f: -numbered[f])


def missing_from(checkpoint: Path, training: bool = False) -> str | None:
    """Return what is missing or cut short in a checkpoint; None where it is whole.

    Args:
        training: also look for the files that only resuming needs.
    """
    skipped = () if training else TRAINING_FILES
    if (unfit := next(unfit_files(checkpoint), None)) is not None:
        return unfit
    files = _manifest(checkpoint).get("files")
    if not isinstance(files, dict):  # an earlier version wrote it, or the manifest is lost
        files = dict.fromkeys(TRAINING_FILES)
        if not any(path.name not in TRAINING_FILES for path in checkpoint.rglob("*.safetensors")):
            return "it holds no model"
    for name, size in files.items():
        path = checkpoint / name
        if name not in skipped and not path.is_file():
            return f"{name} is missing"
        if name not in skipped and size is not None and (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes, expected {size}"
    for path in sorted(checkpoint.rglob("*.safetensors")):
        try:
            if path.name not in skipped:
                with safe_open(path, "pt"):
                    pass
        except (SafetensorError, OSError):
            return f"{path.relative_to(checkpoint)} is damaged"
    if training and not _is_whole_zip(checkpoint / "state.pt"):  # as torch.save writes it
        return "state.pt is damaged"
    return None


def _is_whole_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # damaged bytes cause errors of any kind
        return False


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; {} where it is missing or damaged."""
    try:
        return parse_json(checkpoint / MANIFEST_NAME, dict)
    except (OSError, ValueError):
        return {}


def checkpoint_step(folder: Path) -> int | None:
    """Return the number of updates of a checkpoint; None for another folder."""
    step = _manifest(folder).get("step")
    return step if isinstance(step, int) else None


def write_manifest(checkpoint: Path, step: int) -> None:
    """List the files of a checkpoint, so that a copy in which some are missing is recognised."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    files = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in paths}
    content = json.dumps({"step": step, "files": files}, indent=1)
    (checkpoint / MANIFEST_NAME).write_text(content + "\n", encoding="utf-8")


def save_weights(
    model: nn.Module,
    path: Path,
    dtype: torch.dtype | None = None,
    kind: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `model` and `model.config`, a dataclass, to `path`, in the memory of one tensor more.

    A larger model is split (see `dalle1.tensor_files`). All files are written beside those of an
    earlier model before they replace them; what remains of its files is removed.

    Args:
        dtype: what floating-point parameters are rounded to; None keeps their own.
        kind: name of the model's class in the file; see `dalle1.image_tokenizer`.
        state: tensors by name, read one by one; None is the model's state dict.
    """
    metadata = {"config": json.dumps(asdict(model.config))}  # type: ignore[call-overload]
    if kind is not None:
        metadata["kind"] = kind
    state = model.state_dict() if state is None else state
    shapes = {
        name: (dtype if dtype and t.is_floating_point() else t.dtype, t.shape)
        for name, t in state.items()
    }
    if freed := [name for name, (_, shape) in shapes.items() if not shape.numel()]:
        raise ValueError(
            f"{freed[0]} has no elements, as while the model samples; save it after that"
        )
    files = split_into_shards(path, shapes, max_shard_bytes)
    before = {*shards_of(path), path, index_of(path)}
    with ExitStack() as stack:
        if len(files) > 1:  # entered first, it is renamed last
            partial = stack.enter_context(atomic_path(index_of(path)))
            partial.write_text(index_text(files, shapes), encoding="utf-8")
            before.remove(index_of(path))
        for file, names in files.items():
            part = {name: shapes[name] for name in names}
            partial = stack.enter_context(atomic_path(file))
            write_tensors(partial, part, (state[name] for name in names), metadata)
        if len(files) > 1:  # a mixture of old and new shards is no model
            index_of(path).unlink(missing_ok=True)
    for file in before - files.keys():
        file.unlink(missing_ok=True)
    return path


CLIP_NAME = "clip"
"""Folder of the CLIP in a model folder."""


def refuse_other_clip(folder: Path, clip: Any = None) -> None:
    """Raise ValueError where a folder holds a CLIP, before a model without one is written to it."""
    if clip is None and (folder / CLIP_NAME).is_dir():
        raise ValueError(
            f"{folder} holds a CLIP ({CLIP_NAME}), expected none, since the model that is written "
            "there has none; remove it, or use another folder"
        )


def refuse_other_model(folder: Path, file: str) -> None:
    """Raise ValueError where a folder holds a file that a new model there would not have."""
    if (folder / file).exists():
        raise ValueError(f"{folder} holds {file} of another model; use another folder")


def read_kind(path: Path) -> str | None:
    """Return the kind in a model file's metadata; None where the file has none or is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("kind")
    except SafetensorError:
        return None


def load_config(model_class: type[Any], config_class: type[Config], path: Path) -> Config:
    """Load the config that `save_weights` wrote; ValueError for a missing or damaged file."""
    with _one_error(path, model_class.__name__) as files:
        size, tensors = 0, 0
        metadata: dict[str, str] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                size, tensors = size + path.stat().st_size, tensors + len(file.keys())
                metadata = file.metadata() or {}
        config = config_class(**parse_json(metadata["config"], dict))
        check_types(config)
        refuse_impossible_sizes(config, size, tensors)
        return config


def refuse_impossible_sizes(config: Any, size: int, tensors: int) -> None:
    """Raise ValueError for a config that no file of `size` bytes can have, before it is built."""
    modules = 1
    for name, value in vars(config).items():
        number = len(value) if isinstance(value, (tuple, list)) else value
        if not isinstance(number, int):
            continue
        counts_modules = name in ("depth", "blocks_per_group", "blocks", "layers", "multipliers")
        modules *= number if counts_modules else 1
        most = tensors if counts_modules else max(size, 1 << 16)
        if number > most or modules > tensors:
            raise ValueError(f"{name} is {value}, expected at most {most} in a file of its size")


def load_weights(
    model_class: type[Model],
    config_class: type[Any],
    path: Path,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load what `save_weights` wrote, in eval mode, each tensor straight into `dtype`.

    The model is built without storage for its parameters, so that loading takes the memory of one
    model. Buffers that the file does not hold are built on the CPU by the modules that own them.

    Raises: ValueError where the file is missing, damaged or of another model.
    """
    config = load_config(model_class, config_class, path)
    with _one_error(path, model_class.__name__) as files:
        with without_storage():
            model = model_class(config)
        empty = model.state_dict()
        tensors = {
            name: _with_format_of(empty.get(name, tensor), tensor.to(device))
            for file in files
            for name, tensor in read_tensors(file, dtype)
        }
        model.load_state_dict(tensors, strict=True, assign=True)
    return model.to(device).eval()


def _with_format_of(empty: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` in the memory format of `empty`."""
    if empty.ndim == 4 and empty.is_contiguous(memory_format=torch.channels_last):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


@contextmanager
def _one_error(path: Path, what: str) -> Iterator[list[Path]]:
    """Yield the files of a model; what is missing, damaged or foreign causes a ValueError."""
    if not path.parent.exists():
        raise ValueError(f"no {what} in {path.parent}: the folder does not exist; check its path")
    files = tensor_files(path)
    if not files[0].is_file():
        raise ValueError(f"no {what} in {path.parent}: expected the file {path.name} there")
    for file in files:
        refuse_pointer(file)
    try:
        yield files
    except OSError:
        raise
    except Exception as error:  # damage can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged, or holds no {what} ({reason})") from error


def weights_digest(path: Path) -> str:
    """Return a hash of a model file's tensors in fp16, whatever its metadata and stored type."""
    found = hashlib.sha256()
    with _one_error(path, "model") as files:
        tensors = {k: v for file in files for k, v in read_tensors(file, torch.float16)}
    for name in sorted(name for name in tensors if tensors[name].ndim):  # scalars may be clamped
        found.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold equal tensors in fp16, whatever their metadata."""
    found = []
    for path in (one, other):
        with _one_error(path, "model"):
            found.append(dict(read_tensors(path, torch.float16)))
    first, second = found
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
