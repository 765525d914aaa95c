"""The relaxation: a categorical sample that lets gradients through (paper §2.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard Gumbel noise, shaped as `like`, in fp32: −ln E with E exponential."""
    noise = torch.empty_like(like, dtype=torch.float32)
    # The smallest normal float keeps ln finite; it is met about once in 10^38 draws.
    return (
        noise.exponential_(generator=generator)
        .clamp_min_(torch.finfo(torch.float32).tiny)
        .log_()
        .neg_()
    )


def gumbel_softmax(
    logits: Tensor, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """Sample softmax((logits + Gumbel) / temperature) over the last axis.

    Forward and backward alike use the relaxed sample: the paper takes no straight-through step.
    As the temperature falls to 0 the sample becomes one-hot, with class probabilities
    softmax(logits).

    Args:
        logits: [..., V], unnormalised.
        temperature: above 0. The paper goes from 1 to 1/16.
        generator: source of the noise, on the logits' device.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}, expected a number above 0; "
            "for hard codes use the argmax of the logits"
        )
    return ((logits.float() + gumbel_noise(logits, generator)) / temperature).softmax(-1)
