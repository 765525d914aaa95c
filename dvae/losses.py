"""The dVAE's objective: logit-Laplace likelihood and KL to uniform (paper §2.1, A.2, A.3).

B batch, C = 3 colours, H W image in pixels, h w grid of codes, V codebook size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

PIXEL_MARGIN = 0.1
"""ε of A.3: pixels are squeezed into [ε, 1 − ε], away from the ends where 1/x(1−x) blows up."""


def squeeze_pixels(images: Tensor) -> Tensor:
    """φ: map pixels in [0, 1] into [ε, 1 − ε], where the logit-Laplace density lives (A.3)."""
    return (1 - 2 * PIXEL_MARGIN) * images + PIXEL_MARGIN


def unsqueeze_pixels(squeezed: Tensor) -> Tensor:
    """φ⁻¹, clamped to [0, 1] as in the released code."""
    return ((squeezed - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


def logit_laplace_nll(squeezed: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """−ln f of the paper's equation (A.3), elementwise, in nats.

    f(x | μ, b) = exp(−|logit x − μ| / b) / (2 b x (1 − x)): a Laplace density pushed through a
    sigmoid, so that no mass falls outside the range of pixels.

    Args:
        squeezed: x, in (0, 1); see `squeeze_pixels`.
        mean: μ, in logits.
        log_scale: ln b.
    """
    distance = (torch.logit(squeezed) - mean).abs()
    jacobian = torch.log(squeezed) + torch.log1p(-squeezed)
    return distance * torch.exp(-log_scale) + log_scale + math.log(2) + jacobian


class _Negentropy(torch.autograd.Function):
    """Σ q ln q of q = softmax(logits), over the last axis.

    Its gradient, q (ln q − Σ q ln q), takes a third of the passes over [B, h, w, V] numbers that
    differentiating each operation takes, and holds one such tensor rather than four.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(-1)
        negentropy = log_q.exp().mul_(log_q).sum(-1, keepdim=True)
        ctx.save_for_backward(log_q, negentropy)
        return negentropy.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        log_q, negentropy = ctx.saved_tensors
        return log_q.exp().mul_(log_q - negentropy).mul_(gradients[0].unsqueeze(-1))


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) ‖ uniform) over the last axis, in nats per position: Σ q ln q + ln V."""
    return _Negentropy.apply(logits.float()) + math.log(logits.shape[-1])


def usage_gap(logits: Tensor) -> Tensor:
    """ln V − H(q̄), in nats: how far the batch's mean posterior q̄ is from using all codes alike.

    Paper: no such term. At small budgets it keeps codes from dying before they are of use.
    """
    return kl_to_uniform(logits.float().softmax(-1).flatten(0, -2).mean(0).clamp_min(1e-12).log())


Distortion = Literal["logit-laplace", "mse", "l1"]
"""How far a reconstruction is from its image; the paper uses logit-laplace."""


def distortion_of(images: Tensor, stats: Tensor, kind: Distortion = "logit-laplace") -> Tensor:
    """Return the mean over all colour values of −ln f in nats, or of the squared or absolute error.

    Args:
        images: [B, 3, H, W] in [0, 1].
        stats: [B, 6, H, W]: μ and ln b of each colour. The errors use φ⁻¹(sigmoid(μ)), not
            clamped so that gradients stay, and ignore b.
    """
    mean, log_scale = stats.float().chunk(2, dim=1)
    if kind == "logit-laplace":
        return logit_laplace_nll(squeeze_pixels(images), mean, log_scale).mean()
    error = (mean.sigmoid() - squeeze_pixels(images)) / (1 - 2 * PIXEL_MARGIN)
    if kind == "mse":
        return error.square().mean()
    if kind == "l1":
        return error.abs().mean()
    raise ValueError(f"distortion is {kind!r}, expected logit-laplace, mse or l1")


@dataclass(frozen=True, kw_only=True)
class DVAELoss:
    """What `dvae_loss` returns; every field is a scalar tensor, a mean over the batch."""

    total: Tensor
    """What is minimised, per colour value; with logit-Laplace and β = 1 the negative ELBO."""
    distortion: Tensor
    """−ln f in nats per colour value; with mse or l1, the mean error."""
    kl: Tensor
    """KL(q ‖ uniform), in nats per code."""
    usage_gap: Tensor
    """ln V − H(q̄), in nats; see `usage_gap`."""


def dvae_loss(
    images: Tensor,
    stats: Tensor,
    logits: Tensor,
    *,
    beta: float,
    usage_weight: float = 0.0,
    mse_weight: float = 0.0,
    distortion: Distortion = "logit-laplace",
) -> DVAELoss:
    """Compute the negative ELBO per colour value (paper A.2): mean NLL + β·KL·(codes / values).

    The paper divides the sums by 256·256·3; with means, the weight of one code's KL is
    β·(h·w)/(H·W·3) = β/192, whatever the size of batch and image, so β keeps its meaning.

    Args:
        images: [B, 3, H, W] in [0, 1].
        stats: [B, 6, H, W]: μ and ln b of each colour, as the decoder returns them.
        logits: [B, h, w, V], raw, without noise or temperature.
        beta: the weight of the KL; the paper's goes from 0 to 6.6.
        usage_weight: the weight of `usage_gap`, scaled like one code's KL; the paper's is 0.
        mse_weight: the weight of the mean squared error beside the distortion; the paper's is 0.
        distortion: the reconstruction loss in place of the NLL; the paper uses logit-laplace.
    """
    error = distortion_of(images, stats, distortion)
    kl = kl_to_uniform(logits).mean()
    with torch.set_grad_enabled(torch.is_grad_enabled() and usage_weight != 0):
        gap = usage_gap(logits)
    codes_per_value = logits[..., 0].numel() / images.numel()
    total = error + codes_per_value * (beta * kl + usage_weight * gap)
    if mse_weight:
        total = total + mse_weight * distortion_of(images, stats, "mse")
    return DVAELoss(total=total, distortion=error, kl=kl, usage_gap=gap)


def psnr(images: Tensor, reconstructed: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, of each image of [B, 3, H, W] in [0, 1]: [B]."""
    error = (images - reconstructed).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))
