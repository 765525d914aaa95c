"""A model on disk: one safetensors file with its config in the metadata, nothing unpickled."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def model_folder(directory: str | Path) -> Path:
    """Give the folder with the model: `directory`, or its latest checkpoint if it has any."""
    latest = Path(directory) / "latest"
    return latest.resolve() if latest.exists() else Path(directory)


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype | None = None) -> Path:
    """Write `model` and `model.config`, a dataclass, to `path`; whole or not at all.

    Args:
        dtype: what floating-point weights are rounded to; None keeps them as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in model.state_dict().items()
    }
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata={"config": json.dumps(asdict(model.config))})  # type: ignore[call-overload]
    os.replace(partial, path)
    return path


def load_weights(
    model_class: type[Model], config_class: type[Any], path: Path, device: str | torch.device
) -> Model:
    """Read what `save_weights` wrote, for use: in fp32 and in eval mode.

    Raises: ValueError where the file is missing, damaged or of another model.
    """
    what = model_class.__name__
    if not path.is_file():
        raise ValueError(f"no {what} in {path.parent}: expected the file {path.name} there")
    try:
        with safe_open(path, "pt") as file:
            config = config_class(**json.loads((file.metadata() or {})["config"]))
        model = model_class(config)
        model.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged, or holds no {what} ({reason})") from error
    return model.to(device).eval()
