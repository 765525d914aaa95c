"""OpenAI's released dVAE, read without its package and without running what is in the pickle.

`encoder.pkl` and `decoder.pkl` are pickles of whole modules of the `dall_e` package. Unpickling one
as it is would import and call whatever it names. Here only tensors, plain containers and the few
classes below get through, the classes as empty boxes that hold attributes; any other name is
refused.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)
"""All that a pickle may name beside tensors and containers."""

_NAMES = (  # theirs → ours
    (r"^blocks\.", ""),
    (r"group_(\d+)\.block_(\d+)", lambda m: f"groups.{int(m[1]) - 1}.{int(m[2]) - 1}"),
    (r"\bid_path\b", "identity"),
    (r"\bres_path\b", "residual"),
    (r"^output\.conv\b", "output"),
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
)


_BEFORE_TORCH_1_6 = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
"""How files of the older format begin. torch's weights-only unpickler takes no modules of it."""

_REBUILDERS = {
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.FloatStorage": torch.FloatStorage,
    "torch.HalfStorage": torch.HalfStorage,
    "torch.device": torch.device,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,
}


class _Box:
    """Stands for any of `CLASSES`: it keeps the attributes, and does nothing."""

    dump_patches = False  # torch asks for it where a file has the source of its classes


class _Unpickler(pickle.Unpickler):
    """Finds `CLASSES` and what tensors are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in CLASSES:
            return _Box
        if full not in _REBUILDERS:
            raise pickle.UnpicklingError(f"GLOBAL {full} is not allowed")
        return _REBUILDERS[full]


def _unpickled(path: Path, head: bytes) -> Any:
    if head.startswith(b"PK"):
        allowed: list[Any] = [(_Box, name) for name in CLASSES] + [set]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    if head != _BEFORE_TORCH_1_6:
        raise pickle.UnpicklingError("it was not written by torch.save")
    restricted = SimpleNamespace(
        __name__="restricted", Unpickler=_Unpickler, load=lambda file, **_: _Unpickler(file).load()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a box is not the source that was pickled
        return torch.load(path, "cpu", pickle_module=restricted, weights_only=False)


def read_module(path: str | Path) -> dict[str, Tensor]:
    """Read the parameters of a pickled module of `dall_e`, by the names that `DVAE` gives them.

    Raises: ValueError where the file is no such pickle, or names anything beyond `CLASSES`.
    """
    with Path(path).open("rb") as file:
        head = file.read(len(_BEFORE_TORCH_1_6))
    try:
        module = _unpickled(Path(path), head)
    except Exception as error:  # a damaged pickle may fail in any way
        named = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        why = f"it names {named[1]}" if named else " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is not one of OpenAI's dVAE pickles, and nothing in it was run: {why}. "
            "Expected encoder.pkl or decoder.pkl as released"
        ) from error
    if not isinstance(module, _Box):
        raise ValueError(
            f"{path} holds a {type(module).__name__}, expected a pickled module of dall_e"
        )
    return {_renamed(name): tensor.detach().float() for name, tensor in _parameters(module)}


def _parameters(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, tensor in vars(module).get("_parameters", {}).items():
        if isinstance(tensor, Tensor):
            yield prefix + name, tensor
    for name, child in vars(module).get("_modules", {}).items():
        if isinstance(child, _Box):
            yield from _parameters(child, f"{prefix}{name}.")


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    return name


def sizes(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, int]:
    """Give the fields of `DVAEConfig` that the parameters of encoder and decoder tell.

    Raises: ValueError where they are not those of an encoder and a decoder.
    """
    for what, part, kernel in (("encoder", encoder, 7), ("decoder", decoder, 1)):
        weight = part.get("input.weight")
        if weight is None or weight.ndim != 4 or weight.shape[-1] != kernel:
            raise ValueError(
                f"the {what} is none: expected its first convolution to be {kernel} × {kernel}. "
                "Give encoder.pkl first, then decoder.pkl"
            )
    blocks = {name.split(".")[2] for name in encoder if name.startswith("groups.0.")}
    return {
        "width": encoder["input.weight"].shape[0],
        "blocks_per_group": len(blocks),
        "codebook_size": decoder["input.weight"].shape[1],
        "code_width": decoder["input.weight"].shape[0],
    }
