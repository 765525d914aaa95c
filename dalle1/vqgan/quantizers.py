"""Vector quantizers: features to codes, and codes to the vectors that the decoder reads.

B batch, h w grid of codes, V codebook size, E channels of a code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Codebook(nn.Module):
    """The code vectors, `weight` [V, E]: a buffer, which moving averages train."""

    weight: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(size, width).uniform_(-1 / size, 1 / size))


class NearestQuantizer(nn.Module):
    """Replaces each feature vector by the nearest code vector (VQ-VAE §3.1).

    Its codes are trained by moving averages, not by gradients: see `CodebookAverage`.
    """

    def __init__(self, size: int, width: int, normalized: bool = False) -> None:
        super().__init__()
        self.embedding = Codebook(size, width)
        self.normalized = normalized

    def _comparable(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalized else vectors

    def codes(self, features: Tensor) -> Tensor:
        """Return the nearest codes: [B, E, h, w] → [B, h, w]."""
        z = self._comparable(rearrange(features, "b e h w -> (b h w) e").float())
        e = self._comparable(self.embedding.weight.float())
        with torch.autocast(z.device.type, enabled=False):  # bf16 is too coarse for the nearest
            distance = z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * (z @ e.T)
        b, _, h, w = features.shape
        return distance.argmin(1).view(b, h, w)

    def vectors(self, codes: Tensor) -> Tensor:
        """Look up code vectors: [B, h, w] → [B, E, h, w]."""
        return rearrange(self._comparable(self.embedding.weight)[codes], "b h w e -> b e h w")

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize features; the gradient passes straight through to them.

        Returns: code vectors [B, E, h, w] and codes [B, h, w].
        """
        codes = self.codes(features.detach())
        vectors = self.vectors(codes).to(features.dtype)
        return features + (vectors - features).detach(), codes


class GumbelQuantizer(nn.Module):
    """Chooses the code of the highest logit, as DALL·E's dVAE does."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, size, 1)
        self.embed = nn.Embedding(size, width)

    def codes(self, features: Tensor) -> Tensor:
        """Return the most likely codes: [B, E, h, w] → [B, h, w]."""
        with torch.autocast(features.device.type, enabled=False):  # as for the nearest code
            return self.proj(features.float()).argmax(1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Look up code vectors: [B, h, w] → [B, E, h, w]."""
        return rearrange(self.embed(codes), "b h w e -> b e h w")
