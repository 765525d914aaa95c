"""A model on disk: one safetensors file with its config in the metadata, nothing unpickled.

Files are written and read tensor by tensor, so that neither takes the memory of a second model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")

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
"""The names that safetensors has for what models hold."""


def model_folder(directory: str | Path) -> Path:
    """Give the folder with the model: `directory`, or its latest checkpoint if it has any."""
    latest = Path(directory) / "latest"
    return latest.resolve() if latest.exists() else Path(directory)


BLOCK = 1 << 22
"""Numbers that are converted at once."""


def write_tensors(
    path: Path,
    sizes: Mapping[str, tuple[torch.dtype, Iterable[int]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, one tensor after another.

    Args:
        sizes: name → dtype and shape, in the order of `tensors`.
        tensors: on any device, of any dtype that the file's can hold; read one at a time.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in sizes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": [*shape], "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # what follows is aligned
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor, (dtype, shape) in zip(tensors, sizes.values(), strict=True):
            if tensor.shape != torch.Size(shape):
                raise ValueError(f"a tensor is {tuple(tensor.shape)}, {tuple(shape)} was said")
            whole = tensor.detach().to("cpu", dtype).contiguous().flatten()
            file.write(memoryview(whole.view(torch.uint8).numpy()))  # type: ignore[arg-type]


def read_tensors(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read a safetensors file's names and tensors one after another, mapping nothing.

    Args:
        dtype: what floating-point ones are read into, a block at a time; None keeps their own.
    """
    with safe_open(path, "pt"):
        pass  # it checks that all is there and fits, and says what does not
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
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


def same_tensors(one: Path, other: Path) -> bool:
    """Tell whether two safetensors files hold the same in fp16, whatever their metadata say."""
    first, second = (dict(read_tensors(path, torch.float16)) for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def save_weights(
    model: nn.Module, path: Path, dtype: torch.dtype | None = None, kind: str | None = None
) -> Path:
    """Write `model` and `model.config`, a dataclass, to `path`; whole or not at all.

    Args:
        kind: name of the model's class in the file; see `dalle1.image_tokenizer`.
        dtype: what floating-point weights are rounded to; None keeps them as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    sizes = {
        name: ((dtype or t.dtype) if t.is_floating_point() else t.dtype, t.shape)
        for name, t in weights.items()
    }
    partial = path.with_suffix(".partial")
    metadata = {"config": json.dumps(asdict(model.config))}  # type: ignore[call-overload]
    if kind is not None:
        metadata["kind"] = kind
    write_tensors(partial, sizes, weights.values(), metadata)
    os.replace(partial, path)
    return path


@contextmanager
def _said_plainly(path: Path, what: str) -> Iterator[None]:
    """Turn all that a missing, damaged or foreign file can cause into one line."""
    if not path.is_file():
        raise ValueError(f"no {what} in {path.parent}: expected the file {path.name} there")
    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged, or holds no {what} ({reason})") from error


def read_kind(path: Path) -> str | None:
    """Return the kind in a model file's metadata; None where the file has none or is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("kind")
    except SafetensorError:
        return None


def load_config(model_class: type[Any], config_class: type[Config], path: Path) -> Config:
    """Read the config in what `save_weights` wrote; ValueError where there is none."""
    with _said_plainly(path, model_class.__name__), safe_open(path, "pt") as file:
        return config_class(**json.loads((file.metadata() or {})["config"]))


def load_weights(
    model_class: type[Model],
    config_class: type[Any],
    path: Path,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Read what `save_weights` wrote, for use: in eval mode, each tensor straight into `dtype`.

    Raises: ValueError where the file is missing, damaged or of another model.
    """
    config = load_config(model_class, config_class, path)
    with _said_plainly(path, model_class.__name__):
        with without_weights():
            model = model_class(config)
        empty = model.state_dict()
        read = read_tensors(path, dtype)
        weights = {name: _placed(t, empty.get(name, t), device) for name, t in read}
        model.load_state_dict(weights, strict=True, assign=True)
    return model.to(device).eval()


def _placed(tensor: Tensor, empty: Tensor, device: str | torch.device) -> Tensor:
    """Bring a tensor to where it is used, in the order of memory in which the model has it."""
    tensor = tensor.to(device)
    if empty.ndim == 4 and empty.is_contiguous(memory_format=torch.channels_last):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


@contextmanager
def without_weights() -> Iterator[None]:
    """Within this, modules are made with all but their parameters, which are on the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
