"""CLIP-guided sampling: the gradient of CLIP's similarity moves each step's x̂₀.

B batch, c h w latents of an image, H W sides in pixels, D width of CLIP embeddings.

The classifier p(y | x₀) of Dhariwal & Nichol (2021) is here a CLIP that was trained on images
without noise. So it reads the image that the decoder predicts, not x_t:

    x̂₀ ← x̂₀ + w σ_t² ∇ ln p(y | x̂₀),    ln p(y | x̂₀) = scale · cos(CLIP(decode(x̂₀)), z_t) + const

σ_t² is the variance of x₀ for x_t, as latents have variance 1. At w = 1, y has the weight that
CLIP's learned scale gives it. The gradient stops at x̂₀: through the U-Net it would be divided by
the signal α_t, and at the noisiest times that multiplies the network's error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.clip import Clip
from dalle1.clip.losses import unit_features
from dalle2.autoencoder import AnyAutoencoder
from dalle2.diffusion.schedule import Schedule

IMAGES_AT_ONCE = 16
"""Images whose activations are kept for a gradient."""


def similarity(clip: Clip, images: Tensor, text: Tensor) -> Tensor:
    """Return the cosine similarity of images [B, 3, H, W] in [0, 1] and unit vectors [B, D]: [B].

    It can be differentiated, unlike `Clip.score`.
    """
    size = (clip.image_size, clip.image_size)
    if images.shape[2:] != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    features = clip.model.get_image_features(pixel_values=clip.normalise(images))
    return (unit_features(features) * text).sum(-1)


@dataclass(frozen=True, kw_only=True)
class ClipGuide:
    """Moves x̂₀ towards captions, by the gradient of a CLIP."""

    clip: Clip
    autoencoder: AnyAutoencoder
    schedule: Schedule
    text: Tensor
    """[B, D]: the captions' embeddings by this CLIP, unit vectors."""
    weight: float

    def __call__(self, x0: Tensor, t: int) -> Tensor:
        """Return x̂₀ [B, c, h, w] after a step along the gradient at time t."""
        return x0 + self.weight * self.schedule.sigma(t) ** 2 * self.gradient(x0)

    def gradient(self, x0: Tensor) -> Tensor:
        """Return ∇ ln p(y | x̂₀) of each sample: [B, c, h, w]."""
        parts = zip(x0.split(IMAGES_AT_ONCE), self.text.split(IMAGES_AT_ONCE), strict=True)
        return torch.cat([self._gradient(z, text) for z, text in parts])

    def _gradient(self, x0: Tensor, text: Tensor) -> Tensor:
        with torch.enable_grad():  # samplers run without
            x0 = x0.detach().requires_grad_()
            return torch.autograd.grad(self.log_probability(x0, text).sum(), x0)[0]

    def log_probability(self, x0: Tensor, text: Tensor) -> Tensor:
        """Return ln p(y | x̂₀) up to a constant: [B]."""
        images = self.autoencoder.reconstruct(x0)
        return self.clip.model.logit_scale.exp() * similarity(self.clip, images, text)

    def check(self) -> None:
        """Raise ValueError for a CLIP whose similarity has no gradient."""
        x0, why = self.text.new_zeros(1, *self.autoencoder.latent_shape), "its gradient is nan"
        try:
            found = self.gradient(x0)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            found, why = x0 + torch.nan, " ".join(str(error).split())[:100]
        if not found.isfinite().all():
            raise ValueError(
                f"the CLIP of clip_guidance cannot be differentiated ({why}); use another --clip, "
                "or clip_guidance 0"
            )
