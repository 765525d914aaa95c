"""A transformer arranged for decoding: the same function in fewer and larger operations.

P prompts, n states of each, H heads, d width of a head.

A step of decoding has so few rows that most of its time is the overhead of its operations. So the
angles are looked up, queries and keys are normalized and rotated together, and residuals are added
in place.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.model.attention import Attend, Attention
from dalle1.model.rotary import Rotary
from dalle1.model.transformer import Residual, clamped

Model = TypeVar("Model", bound=nn.Module)
Rotation = tuple[Tensor, Tensor]
"""cos θ twice, and (−sin θ, sin θ): [n or 1, 1, 1, d] or [P, n, 1, 1, d] each."""


def fused(model: Model) -> Model:
    """Return a copy of `model` for steps of decoding that shares its weights, without gradients."""
    return _copy(model)


def _copy(module: nn.Module) -> Any:
    if isinstance(module, Rotary):
        return RotationTable(module)
    shallow = copy.copy(module)
    shallow._modules = {name: m and _copy(m) for name, m in module._modules.items()}
    if isinstance(module, Attention):
        return StepAttention(shallow)
    return StepResidual(shallow) if isinstance(module, Residual) else shallow


class RotationTable(nn.Module):
    """Cosines and sines of all positions, computed once."""

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.rotary, self.cos, self.sin = rotary, torch.empty(0), torch.empty(0)

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Rotation:
        """Look up the rotation at positions [n], [1] or [P, n]."""
        if not len(self.cos):
            every = torch.arange(len(self.rotary.rows), device=positions.device)
            angles = self.rotary(every, dtype)
            cos, sin = angles.cos(), angles.sin()
            self.cos = torch.cat([cos, cos], dim=-1)[:, None, None]
            self.sin = torch.cat([-sin, sin], dim=-1)[:, None, None]
        return self.cos[positions], self.sin[positions]


class StepResidual(nn.Module):
    """A residual branch that adds to its input in place."""

    def __init__(self, residual: Any) -> None:
        super().__init__()
        self.norm, self.branch, self.out_norm = residual.norm, residual.branch, residual.out_norm

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        y = self.branch(self.norm(x), *args)
        return x.add_(y if self.out_norm is None else self.out_norm(clamped(y)))


class StepAttention(nn.Module):
    """`Attention`, with queries and keys normalized and rotated at once."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = attention.heads, attention.qkv, attention.out
        norms = attention.query_norm, attention.key_norm
        self.gains = None
        if norms[0] is not None:
            self.gains = torch.stack([norm.weight.detach() for norm in norms])[:, None]
            self.eps = norms[0].eps

    def forward(self, x: Tensor, attend: Attend, rotation: Rotation | None = None) -> Tensor:
        """Attend: x [P, n, D] → [P, n, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [P, n, 3, H, d]
        qk, v = qkv[:, :, :2], qkv[:, :, 2].transpose(1, 2)
        if self.gains is not None:
            qk = F.rms_norm(qk, qk.shape[-1:], None, self.eps) * self.gains
        if rotation is not None:
            cos, sin = rotation
            qk, half = qk.to(cos.dtype), qk.shape[-1] // 2
            qk = (qk * cos).addcmul_(qk.roll(half, -1), sin).to(v.dtype)
        q, k = qk.permute(2, 0, 3, 1, 4)  # [P, H, n, d]
        y = attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))
