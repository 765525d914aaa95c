"""Gradient scaling for fp16: one scale for the loss, or one for every resblock (§2.4, D, figure 4).

Gradients shrink from the first resblock to the last over more powers of two than fp16's five
exponent bits hold, so that no single loss scale fits them all. With a scale per resblock, each
branch f of x + f(x) multiplies its incoming gradient by its own scale in fp32, computes in fp16,
and divides the outgoing gradient before it joins the identity path, which is fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

INIT_SCALE, MIN_SCALE, MAX_SCALE = 2.0**13, 2.0**7, 2.0**24
GROWTH = 2 ** (1 / 1000)
"""Factor on the scale after an update whose gradients are all finite."""
BACKOFF = 2**-0.5
"""Factor on the scale after an update that overflowed."""
PATIENCE = 125
"""Updates between two falls of a scale, at least."""


class _ScaleGradient(torch.autograd.Function):
    """Identity at the end of a branch; its gradient is multiplied by `scale`."""

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
    """Identity at the start of a branch; its gradient is divided by `scale`, 0 if not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        gradient = gradients[0].float()
        return gradient.where(gradient.isfinite(), 0.0) / scale, None


def scale_gradient(y: Tensor, scale: Tensor) -> Tensor:
    """Return the output of a branch in fp32; its gradient is multiplied by `scale`."""
    return _ScaleGradient.apply(y, scale)


def unscale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """Return the input of a branch; its gradient is divided by `scale`, and 0 if not finite."""
    return _UnscaleGradient.apply(x, scale)


class GradientScaler(Protocol):
    """Keeps the gradients of fp16 in range."""

    stuck: bool
    """Whether the last gradient was not finite though its scale cannot fall further."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the tensor to differentiate."""

    def unscale(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Divide the gradients by their scales and adjust the scales.

        Returns: whether all gradients are finite; if not, the update has to be skipped.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""


class LossScaler:
    """One scale for the whole loss (torch.amp.GradScaler), which suffices for the dVAE (A.2)."""

    def __init__(self, device: torch.device, init_scale: float = 2.0**16, interval: int = 2000):
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=init_scale, growth_interval=interval
        )
        self.stuck = False

    def scale_loss(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        finite = self.scaler.get_scale() >= before
        self.stuck = not finite and before <= 1
        if self.stuck:
            self.scaler.update(1.0)
        return finite

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "good" in state:  # a checkpoint of an earlier version
            interval = self.scaler.get_growth_interval()
            state = {
                **self.scaler.state_dict(),
                "scale": state["scale"],
                "_growth_tracker": int(state["good"]) % interval,
            }
        self.scaler.load_state_dict(state)


class ResblockScaler:
    """One gradient scale for every resblock.

    Args:
        branches: the modules of each resblock's branch, whose gradients come out scaled.

    Attributes:
        scales: [number of resblocks], changed in place, since the branches hold views of it.
    """

    def __init__(self, branches: Sequence[Sequence[nn.Module]]) -> None:
        self.parameters = [[p for m in modules for p in m.parameters()] for modules in branches]
        device = self.parameters[0][0].device
        self.scales = torch.full((len(branches),), INIT_SCALE, device=device)
        self.stuck = False
        self.since_fall = torch.full((len(branches),), PATIENCE)

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss  # each resblock scales its own gradient

    def unscale(self, optimizers: Sequence[torch.optim.Optimizer] = ()) -> bool:
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
        self.stuck = bool((~finite & (self.scales.cpu() <= MIN_SCALE)).any())
        self.scales.mul_(factor.to(self.scales.device)).clamp_(MIN_SCALE, MAX_SCALE)
        return bool(finite.all())

    def state_dict(self) -> dict[str, Tensor]:
        return {"scales": self.scales.clone(), "since_fall": self.since_fall.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scales.copy_(state["scales"])
        self.since_fall = state["since_fall"].clone()
