"""Trainings of transformers and of CLIPs as points of a scaling law."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dalle1.clip import Clip
from dalle1.json_files import parse_json
from dalle1.model.transformer import Transformer
from dalle1.training.checkpoint import Checkpoint, find_checkpoint
from dalle1.training.logging import LOG_NAME

CLIP_REPORT = "clip.json"
"""Report of `dalle1 evaluate clip`."""


class Run(NamedTuple):
    """A training of a transformer or of a CLIP, as far as it got."""

    name: str
    parameters: float
    """Parameters of the layers: without embeddings, and without a transformer's heads."""
    tokens: float
    """Codes seen in training; pairs, for a CLIP."""
    flops: float
    """Compute of the training: three times that of its forward passes."""
    loss: float
    measure: str = "nats per code"
    """Name of the loss."""


def read_run(folder: Path, field: str | None = None) -> Run:
    """Read a training's folder.

    Args:
        field: for a transformer, the loss as log.jsonl names it, by default validation/image; for
            a CLIP, an accuracy in clip.json, by default that of training/zero-shot/noun. The loss
            of a CLIP is its error, 1 − accuracy.

    Raises: ValueError where the folder holds no checkpoint or no such value.
    """
    found = find_checkpoint(folder) if folder.is_dir() else None
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint, expected the folder of a training")
    read = _transformer_run if Transformer.file_in(found.folder).exists() else _clip_run
    run = read(folder, found, field)
    if not 0 < run.loss < math.inf:
        raise ValueError(
            f"the loss of {folder} is {run.loss} {run.measure}, expected a number above 0; remove "
            "this run"
        )
    return run


def _transformer_run(folder: Path, found: Checkpoint, field: str | None) -> Run:
    field = field or "validation/image"
    losses = list(_values(folder / LOG_NAME, field))
    if not losses:
        raise ValueError(f"{folder / LOG_NAME} has no {field}; let the training validate")
    step, loss = losses[-1]
    with torch.device("meta"):
        model = Transformer(Transformer.config_of(found.folder))
    samples = step * int(found.state["resume_key"]["batch_size"])
    return Run(
        name=folder.name,
        parameters=float(sum(p.numel() for p in model.layers.parameters())),
        tokens=float(samples * model.config.image_len),
        flops=3.0 * samples * model.flops(),
        loss=loss,
        measure="nats per code" if field == "validation/image" else field,
    )


def _clip_run(folder: Path, found: Checkpoint, field: str | None) -> Run:
    if not (found.folder / "config.json").exists():
        raise ValueError(f"{folder} trains no transformer and no CLIP; name trainings of these")
    field = field or "training/zero-shot/noun"
    try:
        report = parse_json(folder / CLIP_REPORT, dict)
        accuracy = float(report["scores"][field])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / CLIP_REPORT} has no {field}; run: dalle1 evaluate clip --clip {folder} "
            f"--out {folder}"
        ) from error
    clip = Clip.from_pretrained(found.folder)
    embeddings = (m for m in clip.model.modules() if isinstance(m, nn.Embedding))
    embedded = sum(m.weight.numel() for m in embeddings)
    samples = int(found.state["step"]) * int(found.state["resume_key"]["batch_size"])
    return Run(
        name=folder.name,
        parameters=float(sum(p.numel() for p in clip.model.parameters()) - embedded),
        tokens=float(samples),
        flops=3.0 * samples * clip_flops(clip),
        loss=1 - accuracy,
        measure=f"error of {field}",
    )


def clip_flops(clip: Clip) -> float:
    """Return the FLOPs of both towers for one pair, whose caption has the full length."""
    arch = clip.arch()
    images = torch.zeros(1, 3, arch.image_size, arch.image_size)
    counter = FlopCounterMode(display=False)  # which does not count the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        clip.model.get_image_features(images)
        clip.model.get_text_features(torch.zeros(1, arch.text_len, dtype=torch.long))
    return float(counter.get_total_flops())


def _values(log: Path, field: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line of a log that has a field; broken lines have none."""
    found = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with suppress(ValueError, TypeError, KeyError):
            entry = parse_json(line, dict)
            found.append((int(entry["step"]), float(entry[field])))
    return found
