"""Safetensors files, read and written tensor by tensor; large models lie in several files.

A model of more than `MAX_SHARD_BYTES` is split as Hugging Face's tools do: NAME.safetensors becomes
NAME-00001-of-00003.safetensors …, whose tensors NAME.safetensors.index.json lists.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dalle1.json_files import parse_json

MAX_SHARD_BYTES = 5 * 10**9
"""Most bytes in a file of a model, as on Hugging Face."""
INDEX_SUFFIX = ".index.json"


def index_of(path: Path) -> Path:
    """Return the index that lists the shards of the model file `path`, where it is split."""
    return path.with_name(path.name + INDEX_SUFFIX)


def tensor_files(path: Path) -> list[Path]:
    """Return the files of a model: `path` itself, or the shards that its index lists.

    Raises: ValueError for a damaged index, or one that lists files that are missing.
    """
    index = index_of(path)
    if path.is_file() or not index.is_file():
        return [path]
    try:
        found = parse_json(index, dict)["weight_map"].values()
        names = sorted({str(name) for name in found})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged, expected the index of a model's files") from error
    fit = re.compile(rf"[^/\\]+{re.escape(path.suffix)}")
    if wrong := [name for name in names if not fit.fullmatch(name)]:
        raise ValueError(
            f"{index} lists {wrong[0][:80]!r}, expected names of {path.suffix} files beside it; "
            "get the model again"
        )
    files = [path.with_name(name) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{index} lists {', '.join(missing[:3])}, which {path.parent} does not hold; copy all "
            "files of the model"
        )
    return files


Shapes = Mapping[str, tuple[torch.dtype, Iterable[int]]]
"""Name → dtype and shape."""


def shards_of(path: Path) -> list[Path]:
    """Return the shards that a folder holds of the model file `path`, whatever its index lists."""
    found = path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")
    return [p for p in found if re.fullmatch(r"-\d{5}-of-\d{5}", p.stem.removeprefix(path.stem))]


def split_into_shards(path: Path, shapes: Shapes, max_bytes: int) -> dict[Path, list[str]]:
    """Return the names of the tensors of each file: `path` alone where everything fits."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in shapes:
        more = nbytes(*shapes[name])
        if parts[-1] and size + more > max_bytes:
            parts, size = [*parts, []], 0
        parts[-1].append(name)
        size += more
    if len(parts) == 1:
        return {path: parts[0]}
    stems = (f"{path.stem}-{i + 1:05}-of-{len(parts):05}" for i in range(len(parts)))
    return dict(zip((path.with_name(stem + path.suffix) for stem in stems), parts, strict=True))


def index_text(files: Mapping[Path, Iterable[str]], shapes: Shapes) -> str:
    """Return the content of the index of a model that is split into `files`."""
    size = sum(nbytes(*shape) for shape in shapes.values())
    names = {name: file.name for file, part in files.items() for name in part}
    index = {"metadata": {"total_size": size}, "weight_map": names}
    return json.dumps(index, indent=2) + "\n"


def nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in a safetensors file."""

BLOCK = 1 << 22
"""Numbers converted at a time."""


def read_tensors(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield a safetensors file's names and tensors, one after another.

    `safe_open` maps the file, and mapped pages count as memory: copying 240 MiB of tensors out of
    one open file peaked at 483 MiB, reading them like this at 242 MiB.

    Args:
        dtype: what floating-point tensors are converted to; None keeps their own.
    """
    with safe_open(path, "pt"):
        pass  # it checks that everything is there and fits, and explains what does not
    with path.open("rb") as file:
        header = parse_json(file.read(int.from_bytes(file.read(8), "little")))
        base = file.tell()
        header.pop("__metadata__", None)
        for name, entry in header.items():
            stored = DTYPES[entry["dtype"]]
            wanted = dtype if dtype is not None and stored.is_floating_point else stored
            tensor = torch.empty(entry["shape"], dtype=wanted)
            file.seek(base + entry["data_offsets"][0])
            for block in tensor.view(-1).split(BLOCK):
                raw = block if wanted == stored else torch.empty(len(block), dtype=stored)
                file.readinto(memoryview(raw.view(torch.uint8).numpy()))  # type: ignore[arg-type]
                if raw is not block:
                    block.copy_(raw)
            yield name, tensor


@contextmanager
def open_tensors(path: Path) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """Yield, for the name of each tensor of a model, the function that reads it."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in tensor_files(path)]
        yield {
            name: partial(file.get_tensor, name)
            for file in files
            for name in file.keys()  # noqa: SIM118
        }


def quick_digest(path: Path) -> str:
    """Return a hash of a model's size and of the first and last MiB of each of its files."""
    found, part = hashlib.sha256(), 1 << 20
    for each in tensor_files(path):
        size = each.stat().st_size
        with each.open("rb") as file:
            found.update(f"{size}".encode() + file.read(part))
            file.seek(max(0, size - part))
            found.update(file.read(part))
    return found.hexdigest()[:16]


def write_tensors(
    path: Path,
    shapes: Shapes,
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file from tensors that are never in memory all at once.

    `save_file` needs all of them. A checkpoint of ZeRO's shards is several times the model, and the
    main process gathers one parameter of it at a time.

    Args:
        shapes: name → dtype and shape, in the order of `tensors`.
        tensors: on any device, of any dtype that converts to the file's.
        metadata: what `safe_open(…).metadata()` returns.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {**metadata}} if metadata else {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": names[dtype], "shape": [*shape], "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # aligns the tensors
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor, (name, (dtype, shape)) in zip(tensors, shapes.items(), strict=True):
            if tensor.shape != torch.Size(shape):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(shape)}")
            flat = tensor.detach().to("cpu", dtype).contiguous().flatten()
            file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
