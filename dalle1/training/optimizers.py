"""Optimizers of a model: AdamW, and Muon for the matrices of its layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dalle1.devices import pick_precision
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
    """Return the weights that Muon updates: of the linear modules in `layers`.

    A model with `muon_modules` names others, whose convolutions are updated as well.

    Raises: ValueError without any.
    """
    names: tuple[str, ...] = getattr(model, "muon_modules", ())
    kinds = (nn.Linear, nn.Conv2d) if names else (nn.Linear,)
    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, kinds) and {*(names or ("layers",))} & {*name.split(".")}
    ]
    matrices = [weight for weight in weights if weight.requires_grad]
    if not matrices:
        raise ValueError("optimizer is muon, and this model has no matrices for it; expected adamw")
    return matrices


MAX_TOGETHER = 2**25
"""Numbers of the matrices that are orthogonalized together, at most: it bounds their memory."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with Nesterov momentum; a kernel [C', C, h, w] is C' rows.

    It equals torch.optim.Muon with `match_rms_adamw`, which takes matrices alone and always
    orthogonalizes in bf16: for an update of `toy`, that needs 17 s on a core without bf16, and fp32
    0.7 s.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Take the matrices.

        Args:
            dtype: data type of the orthogonalization.
        """
        self.dtype = dtype
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update each matrix along its orthogonalized gradient, by AdamW's root mean square."""
        for group in self.param_groups:
            for matrices in alike([p for p in group["params"] if p.grad is not None]):
                updates = []
                for p in matrices:
                    grad, average = p.grad, self.state[p]["momentum_buffer"]
                    assert grad is not None
                    average.lerp_(grad, 1 - group["momentum"])
                    updates.append(grad.lerp(average, group["momentum"]).flatten(1))
                scale = 0.2 * math.sqrt(max(updates[0].shape))
                together = orthogonalized(torch.stack(updates).to(self.dtype))
                for p, update in zip(matrices, together, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.reshape(p.shape), alpha=group["lr"] * scale)


def alike(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of matrices of equal shape, which are orthogonalized together.

    A GPU then starts fewer kernels. A list has up to `MAX_TOGETHER` numbers, or one matrix.
    """
    found: dict[Any, list[Tensor]] = defaultdict(list)
    for p in matrices:
        found[p.shape, p.device].append(p)
    for same in found.values():
        count = max(1, MAX_TOGETHER // same[0].numel())
        for start in range(0, len(same), count):
            yield same[start : start + count]


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return matrices [N, r, c] with singular values near 1, by Newton–Schulz in their dtype."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon(model: nn.Module, config: TrainConfig) -> Muon:
    """Return the optimizer of the layers' matrices; its updates have AdamW's root mean square."""
    matrices = layer_matrices(model)
    device = matrices[0].device
    slow = device.type == "cpu" and pick_precision("auto", device) != torch.bfloat16
    return Muon(
        matrices,
        config.learning_rate,
        config.weight_decay,
        dtype=torch.float32 if slow else torch.bfloat16,
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
