"""Losses of a VQ-VAE, and of a VQGAN's generator and discriminator.

B batch, H W image in pixels, h w grid of codes, E channels of a code, P Q patches of a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_PATCH_SIZE = 24
"""Least side in pixels of an image that `PatchDiscriminator` has a verdict for."""
PixelLoss = Literal["l1", "mse"]


@dataclass(frozen=True, kw_only=True)
class VQLoss:
    """Loss of the encoder, codes and decoder; every field is a scalar tensor, a mean."""

    total: Tensor
    """What is minimised."""
    reconstruction: Tensor
    """Mean error of a colour value."""
    commitment: Tensor
    """Mean squared distance of features to their code vectors, per channel."""
    restarts: Tensor
    """Codes that restarted at this update."""


@dataclass(frozen=True, kw_only=True)
class PerceptualVQLoss(VQLoss):
    """The same with a perceptual loss."""

    perceptual: Tensor
    """Mean distance by LPIPS."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorLoss:
    """Loss of the discriminator: a scalar tensor."""

    total: Tensor


def reconstruction_error(images: Tensor, reconstructed: Tensor, kind: PixelLoss) -> Tensor:
    """Return the mean absolute (l1) or squared (mse) error over all colour values, [0, 1]."""
    error = F.l1_loss if kind == "l1" else F.mse_loss
    return error(reconstructed.float(), images.float())


def commitment_loss(features: Tensor, vectors: Tensor) -> Tensor:
    """‖z − sg[e]‖², the mean over batch, positions and channels (VQ-VAE, eq. 3).

    Args:
        features: z, [B, E, h, w].
        vectors: e, the code vectors of z, of the same shape; no gradient reaches them.
    """
    return F.mse_loss(features, vectors.detach())


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ E[max(0, 1 − D(x))] + ½ E[max(0, 1 + D(x̂))] (Lim & Ye 2017): the discriminator's loss.

    Args:
        real: verdicts on images, [B, 1, P, Q].
        fake: verdicts on reconstructions.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """λ = ‖∇ reconstruction‖ / (‖∇ adversarial‖ + 1e-4) (VQGAN, eq. 7), at most 10⁴.

    With it, both losses move the decoder's last layer by steps of the same size.

    Args:
        last: weight of the decoder's last layer.
    """
    (of_pixels,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (of_verdicts,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (of_pixels.norm() / (of_verdicts.norm() + 1e-4)).clamp_max(1e4).detach()


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): a verdict for each patch of 70×70 pixels.

    Images [B, 3, H, W] in [0, 1] → [B, 1, P, Q]. Paper: BatchNorm. Here GroupNorm, which has no
    running statistics and does not mix the samples of a batch.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            a, b = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            stride = 2 if i < layers else 1
            modules += [
                nn.Conv2d(a, b, 4, stride, 1, bias=False),
                nn.GroupNorm(min(32, b // 4), b),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*modules, nn.Conv2d(b, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(2 * images - 1)
