"""Trainings as points of a scaling law."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from dalle1.model.transformer import Transformer
from dalle1.training.checkpoint import find_checkpoint
from dalle1.training.logging import LOG_NAME


class Run(NamedTuple):
    """A training of a transformer, as far as it got."""

    name: str
    parameters: float
    """Parameters of the layers: without embeddings and heads."""
    tokens: float
    """Codes seen in training."""
    flops: float
    """Compute of the training: three times that of its forward passes."""
    loss: float


def read_run(folder: Path, field: str = "validation/image") -> Run:
    """Read a training's folder: its checkpoint, and the last value of `field` in its log.

    Raises: ValueError where the folder holds no checkpoint or no such value.
    """
    found = find_checkpoint(folder) if folder.is_dir() else None
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint, expected the folder of a training")
    losses = list(_values(folder / LOG_NAME, field))
    if not losses:
        raise ValueError(f"{folder / LOG_NAME} has no {field}; let the training validate")
    step, loss = losses[-1]
    with torch.device("meta"):
        model = Transformer(Transformer.config_of(folder))
    samples = step * int(found.state["resume_key"]["batch_size"])
    return Run(
        name=folder.name,
        parameters=float(sum(p.numel() for p in model.layers.parameters())),
        tokens=float(samples * model.config.image_len),
        flops=3.0 * samples * model.flops(),
        loss=loss,
    )


def _values(log: Path, field: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line of a log that has a field; broken lines have none."""
    found = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if field in entry:
            found.append((int(entry["step"]), float(entry[field])))
    return found
