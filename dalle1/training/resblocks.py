"""How the resblocks of a transformer are computed while it is trained."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dalle1.model.transformer import Layer, Transformer
from dalle1.training.scaling import GradientScales, scaled

Branch = Callable[[Tensor], Tensor]


def prepare(
    model: Transformer, *, checkpointing: bool = False, scaling: bool = False
) -> GradientScales | None:
    """Have `model` compute its resblocks as asked, until it is asked otherwise.

    Args:
        checkpointing: keep only what goes into each resblock, and compute the rest again going back
            (§2.4): less memory for a third more work.
        scaling: give each resblock a gradient scale of its own; what is given then is to unscale
            the gradients before each update.
    """
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    scales = GradientScales([b for layer in layers for b in layer.branches()]) if scaling else None
    if scales is not None:
        scales.scales = scales.scales.to(next(model.parameters()).device)

    def around(number: int) -> Callable[[int, Branch, Tensor], Tensor]:
        def run(which: int, branch: Branch, x: Tensor) -> Tensor:
            def whole(h: Tensor) -> Tensor:
                if scales is None:
                    return branch(h)
                return scaled(branch, h, scales.scales[2 * number + which])

            if checkpointing and x.requires_grad:
                return checkpoint(whole, x, use_reentrant=False)
            return whole(x)

        return run

    for number, layer in enumerate(layers):
        layer.around = around(number) if checkpointing or scaling else None
    return scales
