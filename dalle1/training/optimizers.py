"""Optimizers of a model: AdamW, and Muon for the matrices of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dalle1.training.config import TrainConfig


def full_shape(p: Tensor) -> torch.Size:
    """Return a parameter's shape, also where DeepSpeed has sharded it."""
    return torch.Size(getattr(p, "ds_shape", p.shape))


def split_by_decay(model: nn.Module, decays: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that decay, and the others; frozen ones are in neither list."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        is_weight = len(full_shape(p)) > 1
        is_matrix = is_weight and id(p) not in tables
        decayed = is_matrix or decays == "all" or (decays == "weights" and is_weight)
        if p.requires_grad:
            (decaying if decayed else others).append(p)
    return decaying, others


def layer_matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of the linear modules in `layers`; ValueError without any."""
    linears = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name.split(".")
    ]
    matrices = [weight for weight in linears if weight.requires_grad]
    if not matrices:
        raise ValueError("optimizer is muon, and this model has no matrices for it; expected adamw")
    return matrices


def muon(model: nn.Module, config: TrainConfig) -> torch.optim.Muon:
    """Return the optimizer of the layers' matrices; its updates have AdamW's root mean square."""
    return torch.optim.Muon(
        layer_matrices(model),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return the optimizer, in every engine, of all parameters that Muon does not update."""
    moved = {id(p) for p in layer_matrices(model)} if config.optimizer == "muon" else set()
    decaying, others = (
        [p for p in part if id(p) not in moved] for part in split_by_decay(model, config.decays)
    )
    groups: list[dict[str, Any]] = [
        {"params": decaying},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
