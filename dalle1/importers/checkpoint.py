"""Read tensors from foreign checkpoints: nothing that a pickle names is imported or called."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dalle1.model_files import refuse_pointer
from dalle1.storage import read_tensors

TRAINING_CLASSES = (
    "argparse.Namespace",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
"""Classes that training programs leave in their checkpoints."""


MAX_TEXT = 64 << 20
"""Most bytes of a vocabulary; the published ones have up to 3 MB."""


class Stub:
    """A stand-in for a class that a pickle names, with its attributes and no behaviour."""


def unpickle(path: str | Path, classes: Sequence[str] = TRAINING_CLASSES) -> Any:
    """Return the content of a file of torch.save: tensors, plain containers and stubs.

    Torch's weights-only unpickler reads it. Tensors stay in the file until they are used.

    Args:
        classes: names that the pickle may contain; each object becomes a `Stub`.

    Raises: ValueError where the file is not one that torch 1.6 or later wrote, is damaged, or names
        anything else.
    """
    refuse_pointer(Path(path))
    with Path(path).open("rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:  # torch reads other formats, too, by less careful ways
        raise ValueError(
            f"{path} is no file that torch 1.6 or later has written; expected the file as released"
        )
    _refuse_compressed(path)
    allowed: list[Any] = [(Stub, name) for name in classes] + [set]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may fail in any way
        named = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        why = f"it names {named[1]}" if named else " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} cannot be read, and nothing in it was run: {why}; expected the file as "
            "released"
        ) from error
    for tensor in _tensors_in(content):
        _refuse_more_than_stored(tensor, path)
    return content


def _refuse_compressed(path: str | Path) -> None:
    """Raise ValueError for an archive whose content is larger than the file; torch writes none."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch reports the damage
    if compressed:
        raise ValueError(f"{path} is compressed inside; expected the file as released")


def _tensors_in(content: Any) -> Iterator[Tensor]:
    """Yield all tensors in what `unpickle` returns, each object once: lists may hold themselves."""
    pending, seen = [content], set()
    while pending:
        found = pending.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, Mapping):
            pending += found.values()
        elif isinstance(found, (list, tuple, set)):
            pending += found
        elif isinstance(found, Stub):
            pending.append(vars(found))


def _refuse_more_than_stored(tensor: Tensor, path: str | Path) -> None:
    """Raise ValueError for a tensor that takes more memory than the file has bytes for it."""
    if tensor.is_complex():
        raise ValueError(f"{path} has a tensor of {tensor.dtype}, expected real numbers")
    plain = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)
    if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path} has a tensor {tuple(tensor.shape)} without as many stored numbers; expected "
            "the file as released"
        )


def read_text(path: str | Path) -> str:
    """Read a text file, perhaps a .gz, of limited size.

    Raises: OSError where it cannot be read; ValueError where it is larger, or no text.
    """
    with Path(path).open("rb") as file:
        raw = file.read(2)
        file.seek(0)
        try:
            raw = (gzip.GzipFile(fileobj=file) if raw == b"\x1f\x8b" else file).read(MAX_TEXT + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError("a damaged .gz; fetch it again") from error
    if len(raw) > MAX_TEXT:
        raise ValueError(f"more than {MAX_TEXT >> 20} MiB of text")
    return raw.decode("utf-8")


def read_state_dict(path: str | Path, keys: Sequence[str] = ("state_dict",)) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name.

    Args:
        path: a file of torch.save with a state dict, or a safetensors file.
        keys: entries that may hold the state dict; without any of them, the file is one itself.

    Raises: OSError where the file cannot be read; ValueError where it is damaged, hostile, or holds
        no state dict.
    """
    if str(path).endswith(".safetensors"):
        try:
            return dict(read_tensors(Path(path)))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error
    content = unpickle(path)
    for key in keys:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors, expected a state dict")
    return tensors


def without_prefix(tensors: Mapping[str, Tensor], name: str, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors below the prefix of the one called `name`, without that prefix.

    Raises: ValueError where no tensor is called `name`, or several are.
    """
    found = [key.removesuffix(name) for key in tensors if key == name or key.endswith("." + name)]
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} tensors called {name}, expected one")
    return {k.removeprefix(found[0]): t for k, t in tensors.items() if k.startswith(found[0])}


def numbers_after(prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[int]:
    """Yield the different numbers that follow `prefix` in the names, in ascending order."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    yield from sorted({int(m[1]) for name in tensors if (m := pattern.match(name))})
