"""fp16 with a gradient scale of its own for every resblock (paper §2.4, D; figure 4).

Gradients shrink from the first resblock to the last over more powers of two than fp16's five bits
of exponent hold, so that no single loss scale fits them all. Here each branch f of x + f(x)
multiplies the gradient that comes in by its own scale, in fp32, computes in fp16, and divides the
gradient that goes out again before it joins the identity path, which is fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FIRST, LEAST, MOST = 2.0**13, 2.0**7, 2.0**24
GROWTH = 2 ** (1 / 1000)
"""Factor of an update whose gradients are all finite."""
BACKOFF = 2**-0.5
"""Factor of an update that overflowed."""
PATIENCE = 125
"""Updates in which a scale falls no second time."""


class _ScaleGradient(torch.autograd.Function):
    """Where a branch ends: the identity, whose gradient is multiplied by `scale`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = y.dtype
        return y.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return (gradients[0] * scale).to(ctx.dtype), None


class _UnscaleGradient(torch.autograd.Function):
    """Where a branch begins: the identity, whose gradient is filtered and divided by `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        gradient = gradients[0].float()
        return gradient.where(gradient.isfinite(), 0.0) / scale, None


def scaled(branch: Callable[[Tensor], Tensor], x: Tensor, scale: Tensor) -> Tensor:
    """Compute branch(x) so that its gradients are `scale` times as large while in the branch."""
    return _ScaleGradient.apply(branch(_UnscaleGradient.apply(x, scale)), scale)


class LossScale:
    """One scale for the whole loss: the ordinary way, which is enough for stage 1 (paper A.2).

    Attributes:
        stuck: whether the last gradient was not finite though the scale cannot fall further.
    """

    def __init__(self, model: nn.Module, first: float = 2.0**16, patience: int = 2000) -> None:
        self.model, self.scale, self.patience, self.good = model, first, patience, 0
        self.stuck = False

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Give what to differentiate."""
        return loss * self.scale

    def unscale(self) -> bool:
        """Divide the gradients by the scale and move it; say whether they are all finite."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.scale)
        finite = bool(torch.stack([g.isfinite().all() for g in gradients]).all())
        self.good = self.good + 1 if finite else 0
        self.stuck = not finite and self.scale <= 1
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good % self.patience == 0:
            self.scale *= 2
        return finite

    def state_dict(self) -> dict[str, float]:
        """Give what resuming needs."""
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take back what `state_dict` gave."""
        self.scale, self.good = state["scale"], int(state["good"])


class GradientScales:
    """The scales of all resblocks, and what is known of them; state for a checkpoint.

    Args:
        branches: the modules of each resblock's branch, whose gradients come out scaled.

    Attributes:
        stuck: whether a gradient was not finite though its scale cannot fall further.
    """

    def __init__(self, branches: Sequence[Sequence[nn.Module]]) -> None:
        self.parameters = [[p for m in modules for p in m.parameters()] for modules in branches]
        self.scales = torch.full((len(branches),), FIRST)
        self.stuck = False
        self.since_fall = torch.full((len(branches),), PATIENCE)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Give what to differentiate: the loss as it is, since each resblock scales for itself."""
        return loss

    def unscale(self) -> bool:
        """Divide the gradients by their scales and move the scales.

        Returns: whether all gradients are finite; if not, the update is to be skipped.
        """
        finite = torch.ones(len(self.scales), dtype=torch.bool)
        factors = (1 / self.scales).tolist()
        for i, parameters in enumerate(self.parameters):
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, factors[i])
                finite[i] = bool(torch.stack([g.isfinite().all() for g in gradients]).all())
        falls = ~finite & (self.since_fall >= PATIENCE)
        self.since_fall = torch.where(falls, 0, self.since_fall + 1)
        factor = torch.where(finite, GROWTH, torch.where(falls, BACKOFF, 1.0))
        self.stuck = bool((~finite & (self.scales.cpu() <= LEAST)).any())
        # In place: the branches hold views of it.
        self.scales.mul_(factor.to(self.scales.device)).clamp_(LEAST, MOST)
        return bool(finite.all())

    def state_dict(self) -> dict[str, Tensor]:
        """Give what resuming needs."""
        return {"scales": self.scales.clone(), "since_fall": self.since_fall.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.scales.copy_(state["scales"])
        self.since_fall = state["since_fall"].clone()
