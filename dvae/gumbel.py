"""The relaxation: a categorical sample that lets gradients through (paper §2.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample standard Gumbel noise, shaped as `like`, in fp32: −ln(−ln u) with u uniform in (0, 1).

    `exponential_` would give −ln u by itself, but on a CPU it takes six times as long.
    """
    uniform = torch.empty_like(like, dtype=torch.float32).uniform_(generator=generator)
    # Uniform floats are multiples of 2⁻²⁴: half of one at either end keeps both logarithms finite.
    half = 2.0**-25
    return uniform.clamp_(half, 1 - 2 * half).log_().neg_().log_().neg_()


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
    # Modified in place: the noise is as large as the logits, and is not needed again.
    return gumbel_noise(logits, generator).add_(logits).div_(temperature).softmax(-1)
