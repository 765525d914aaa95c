"""How the resblocks of a transformer are computed in training, set up from outside the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dalle1.model.transformer import Layer, Residual, Transformer
from dalle1.training.scaling import ResblockScaler, scale_gradient, unscale_gradient


class TrainedResidual(Residual):
    """A resblock that shares the modules of another, checkpointed or with a gradient scale."""

    def __init__(self, inner: Residual, *, checkpointing: bool, scale: Tensor | None) -> None:
        super().__init__(inner.norm, inner.branch, inner.out_norm)
        self.checkpointing, self.scale = checkpointing, scale

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        def run(h: Tensor) -> Tensor:
            if self.scale is None:
                return self.update(h, *args)
            return scale_gradient(self.update(unscale_gradient(h, self.scale), *args), self.scale)

        if self.checkpointing and x.requires_grad:
            return x + checkpoint(run, x, use_reentrant=False)
        return x + run(x)


def prepare(
    model: Transformer, *, checkpointing: bool = False, scaling: bool = False
) -> ResblockScaler | None:
    """Replace the resblocks of `model` by wrapped ones with the same parameters.

    Args:
        checkpointing: keep only the input of each resblock, and recompute the rest in the backward
            pass (§2.4): less memory for a third more computation.
        scaling: use a gradient scale per resblock.

    Returns: the scaler that unscales the gradients before each update; None without `scaling`.
    """
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    residuals = [r for layer in layers for r in (layer.attention, layer.mlp)]
    scaler = ResblockScaler([[r] for r in residuals]) if scaling else None

    def wrapped(residual: Residual, number: int) -> Residual:
        if not checkpointing and scaler is None:
            return Residual(residual.norm, residual.branch, residual.out_norm)
        scale = None if scaler is None else scaler.scales[number]
        return TrainedResidual(residual, checkpointing=checkpointing, scale=scale)

    for number, layer in enumerate(layers):
        layer.attention = wrapped(layer.attention, 2 * number)
        layer.mlp = wrapped(layer.mlp, 2 * number + 1)
    return scaler
