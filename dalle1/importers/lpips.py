"""Read the weights of LPIPS from local files; nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dalle1.importers.checkpoint import read_state_dict
from dalle1.importers.state_dict import one_error
from dalle1.vqgan.lpips import LINEAR, LPIPS, NAMES

# A checkpoint of taming-transformers holds both networks in its loss.
_PREFIX = re.compile(r"^(loss\.perceptual_loss\.)?(net\.slice\d\.)?")


def load_lpips(paths: Iterable[Path]) -> LPIPS:
    """Load LPIPS from vgg16-397923af.pth and vgg.pth, or from a checkpoint of taming-transformers.

    Raises: OSError where a file cannot be read; ValueError where tensors are missing or of other
        shapes.
    """
    files = [str(path) for path in paths]
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read(file).items():
            short = _PREFIX.sub("", name)
            tensors[f"features.{short}" if short[:1].isdigit() else short] = tensor
    if missing := [name for name in (*NAMES, *LINEAR) if name not in tensors]:
        raise ValueError(
            f"lpips is {', '.join(files)}, which has no tensor {missing[0]}; expected "
            "vgg16-397923af.pth of torchvision and vgg.pth of the package lpips, or a checkpoint "
            "of taming-transformers"
        )
    with one_error(", ".join(files), "LPIPS on VGG16"):
        model = LPIPS(tensors)
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    return model


def _read(path: str) -> Mapping[str, Tensor]:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip or path.endswith(".safetensors"):
        return read_state_dict(path)
    try:  # torchvision's file is older than torch's zip format
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # a damaged pickle may fail in any way
        raise ValueError(
            f"{path} cannot be read ({' '.join(str(error).split())[:80]}); expected weights of "
            "VGG16 or LPIPS"
        ) from error
