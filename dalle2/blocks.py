"""The parts of the denoising U-Net: those of ADM and GLIDE, and those of Stable Diffusion.

B batch, C channels, H W sides, E width of the time embedding, T tokens, X width of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class Context:
    """A condition, embedded once for all steps of a sampler."""

    vector: Tensor
    """[B, E], added to the time embedding."""
    tokens: Tensor
    """[B, K + T, X], read by attention; X is E unless `context_width` is set."""
    mask: Tensor
    """[B, K + T], bool: the tokens that are visible."""


def norm(channels: int, group_width: int = 1) -> nn.GroupNorm:
    """Return a group normalization of at most 32 groups, of `group_width` channels or more."""
    most = min(32, max(1, channels // group_width))
    return nn.GroupNorm(math.gcd(channels, most), channels)


def zero(module: nn.Module) -> nn.Module:
    """Return a module whose parameters start at 0, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Return sines and cosines of times [B] at geometric frequencies: [B, width]."""
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2)
    )
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """The input + norm, SiLU, conv, norm, scale and shift by the embedding, SiLU, conv.

    With `scales` off, the embedding only shifts, before the second norm, as in Ho et al. 2020.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding: int,
        dropout: float,
        resize: float = 1.0,
        scales: bool = True,
    ) -> None:
        super().__init__()
        self.resize, self.scales = resize, scales
        self.norm_in, self.conv_in = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, (2 if scales else 1) * c_out)
        self.norm_out, self.dropout = norm(c_out), nn.Dropout(dropout)
        self.conv_out = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.identity = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def resized(self, x: Tensor) -> Tensor:
        """Return x with sides doubled or halved, or as it is."""
        if self.resize == 1:
            return x
        return F.interpolate(x, scale_factor=2.0) if self.resize > 1 else F.avg_pool2d(x, 2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # [B, C, H, W] → [B, C', H', W']
        y = self.conv_in(self.resized(F.silu(self.norm_in(x))))
        modulation = self.modulation(F.silu(embedding))[..., None, None]
        if self.scales:
            scale, shift = modulation.chunk(2, dim=1)
            y = self.norm_out(y) * (1 + scale) + shift
        else:
            y = self.norm_out(y + modulation)
        return self.identity(self.resized(x)) + self.conv_out(self.dropout(F.silu(y)))


def attend(heads: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend in heads from q [B, N, C] to k and v [B, M, C], by a mask [B, 1, 1, M] if any."""
    q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=heads) for y in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(y, "b h n d -> b n (h d)")


class Attention(nn.Module):
    """Attention over all positions and the context's tokens, whose keys are concatenated."""

    def __init__(self, channels: int, context: int, head_width: int) -> None:
        super().__init__()
        self.heads = channels // head_width
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context = nn.Linear(context, 2 * channels) if context else None
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Context | None) -> Tensor:  # [B, C, H, W]
        flat = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = self.qkv(flat).chunk(3, dim=-1)
        mask = None
        if self.context is not None and context is not None:
            more_k, more_v = self.context(context.tokens).chunk(2, dim=-1)
            k, v = torch.cat([more_k, k], 1), torch.cat([more_v, v], 1)
            mask = F.pad(context.mask, (0, flat.shape[1]), value=True)[:, None, None]
        y = self.out(attend(self.heads, q, k, v, mask))
        return x + rearrange(y, "b (h w) c -> b c h w", h=x.shape[2])


class Resample(nn.Module):
    """A convolution that halves the sides, or one after doubling them: Stable Diffusion's."""

    def __init__(self, channels: int, resize: float) -> None:
        super().__init__()
        self.resize = resize
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if resize > 1 else 2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # [B, C, H, W] → [B, C, H', W']
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.resize > 1 else x)


class SpatialTransformer(nn.Module):
    """A transformer layer over all positions: self-attention, cross-attention, MLP (GEGLU).

    It is Stable Diffusion's (Rombach et al. 2022, App. E.2.1): tokens have attention of their own,
    which reads all of them, padding as well.
    """

    def __init__(self, channels: int, context: int, head_width: int) -> None:
        super().__init__()
        self.heads = channels // head_width
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.enter, self.leave = nn.Linear(channels, channels), zero(nn.Linear(channels, channels))
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(channels) for _ in range(3))
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.self_out = nn.Linear(channels, channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.context = nn.Linear(context, 2 * channels, bias=False)
        self.cross_out = nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, context: Context | None) -> Tensor:  # [B, C, H, W]
        if context is None:
            raise ValueError("this U-Net reads captions, expected a condition")
        y = self.enter(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        y = y + self.self_out(attend(self.heads, *self.qkv(self.self_norm(y)).chunk(3, -1)))
        k, v = self.context(context.tokens).chunk(2, -1)
        y = y + self.cross_out(attend(self.heads, self.query(self.cross_norm(y)), k, v))
        values, gate = self.up(self.mlp_norm(y)).chunk(2, -1)
        y = self.leave(y + self.down(values * F.gelu(gate)))
        return x + rearrange(y, "b (h w) c -> b c h w", h=x.shape[2])


class Stage(nn.Module):
    """A residual block or a change of sides, and attention where its side asks for it."""

    def __init__(
        self,
        block: ResBlock | Resample,
        attention: Attention | SpatialTransformer | None = None,
    ) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, embedding: Tensor, context: Context | None) -> Tensor:
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x, context)
