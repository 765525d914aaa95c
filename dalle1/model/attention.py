"""Attention of the joint stream, skipping what the mask hides.

B batch, H heads, T = L + N positions: L of text, N = W² of the image; D width, d width of a head.

The skipping form computes blocks of W codes (`dalle1.model.sparse_layout`), so that the scores of a
block are [W, L + (back + 1)·W] and never [T, T]; one softmax covers text and blocks together.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle1.model.layers import Linear
from dalle1.model.masks import MaskKind
from dalle1.model.rotary import apply_rotary
from dalle1.model.sparse_layout import SparseLayout


class MaskedAttention(nn.Module):
    """Attention over whole streams under one kind of mask, shared by all layers of that kind."""

    dense: Tensor
    """[T, T]: whether position i sees position j."""
    block_mask: Tensor
    """[W, W, (back + 1)·W]: the same inside the blocks; see `SparseLayout.block_mask`."""

    def __init__(
        self, kind: MaskKind, text_len: int, grid_size: int, conv_wrap: bool = True
    ) -> None:
        super().__init__()
        self.layout = SparseLayout(kind, text_len, grid_size, conv_wrap)
        with torch.device(
            "cpu"
        ):  # a file has no buffers: a model on the meta device makes them, too
            dense, block_mask = self.layout.dense(), self.layout.block_mask()
        self.register_buffer("dense", dense, persistent=False)
        self.register_buffer("block_mask", block_mask, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend over whole streams: [B, H, T, d] each → [B, H, T, d]."""
        return attend(q, k, v, self)

    @cached_property
    def flex_mask(self) -> Any:
        """The mask as FlexAttention takes it, with the codes in block order."""
        from torch.nn.attention.flex_attention import create_block_mask

        dense = self.layout.permute_stream(self.dense[None, None].transpose(2, 3)).transpose(2, 3)
        dense = self.layout.permute_stream(dense)[0, 0].contiguous()

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return dense[i, j]

        return create_block_mask(sees, None, None, len(dense), len(dense), str(dense.device))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: MaskedAttention) -> Tensor:
    """Attend over whole streams, skipping what the mask hides: [B, H, T, d] each → [B, H, T, d]."""
    if mask.layout.kind == "full":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attend_flex(q, k, v, mask) if q.is_cuda else attend_blocks(q, k, v, mask)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: MaskedAttention) -> Tensor:
    """Attend by FlexAttention, which skips tiles that are hidden entirely."""
    arranged = (mask.layout.permute_stream(x) for x in (q, k, v))
    return mask.layout.permute_stream(
        compiled_flex_attention()(*arranged, block_mask=mask.flex_mask)
    )


@cache
def compiled_flex_attention() -> Any:
    """Return FlexAttention, compiled where there is a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return (
        torch.compile(flex_attention, dynamic=False)
        if torch.cuda.is_available()
        else flex_attention
    )


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: MaskedAttention) -> Tensor:
    """Attend by plain matrix products over each block and the few before it."""
    layout = mask.layout
    length, w = layout.text_len, layout.grid_size
    q = q / math.sqrt(q.shape[-1])
    (text_q, q), (text_k, k), (text_v, v) = (
        (x[:, :, :length], layout.to_blocks(x[:, :, length:])) for x in (q, k, v)
    )
    scores = text_q @ text_k.transpose(-1, -2)
    ahead = ~mask.dense[:length, :length]
    text = scores.masked_fill(ahead, -torch.inf).softmax(-1).to(v.dtype) @ text_v
    q = rearrange(q, "b h (n w) d -> b h n w d", w=w)
    k, v = layout.windows(k), layout.windows(v)
    image = BlockAttention.apply(q, text_k, text_v, k, v, ~mask.block_mask)
    return torch.cat([text, layout.to_blocks(image.flatten(2, 3))], dim=2)


class BlockAttention(torch.autograd.Function):
    """Attention of blocks of codes to the text and to their windows, under one softmax.

    Its gradient is written out to work in place and to keep only e^(s − max), with Z its sum over a
    row: for the output o = e·v / Z and its gradient g, the scores' is e·(g·v − g·o) / Z.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, text_k: Tensor, text_v: Tensor, k: Tensor, v: Tensor, hidden: Tensor
    ) -> Tensor:
        """Attend: q [B, H, n, W, d], text [B, H, L, d], windows [B, H, n, S, d] → as q."""
        blocks = q.shape[2:4]
        text_scores = (q.flatten(2, 3) @ text_k.transpose(-1, -2)).unflatten(2, blocks)
        code_scores = (q @ k.transpose(-1, -2)).masked_fill_(hidden, -torch.inf)
        highest = torch.maximum(
            text_scores.amax(-1, keepdim=True), code_scores.amax(-1, keepdim=True)
        )
        total = torch.zeros_like(highest, dtype=torch.float32)
        for scores in (text_scores, code_scores):
            scores.sub_(highest).exp_()
            total += scores.sum(-1, keepdim=True, dtype=torch.float32)
        out = (text_scores.flatten(2, 3) @ text_v).unflatten(2, blocks) + code_scores @ v
        out = (out / total).to(q.dtype)
        ctx.save_for_backward(q, text_k, text_v, k, v, text_scores, code_scores, total, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, text_k, text_v, k, v, text_scores, code_scores, total, out = ctx.saved_tensors
        (g,) = gradients
        correction = ((g * out).sum(-1, keepdim=True, dtype=torch.float32) / total).to(q.dtype)
        g = (g / total).to(q.dtype)
        flat_q, flat_g, e = q.flatten(2, 3), g.flatten(2, 3), text_scores.flatten(2, 3)
        d_text_scores = (flat_g @ text_v.transpose(-1, -2)).sub_(correction.flatten(2, 3)).mul_(e)
        d_code_scores = (g @ v.transpose(-1, -2)).sub_(correction).mul_(code_scores)
        return (
            (d_text_scores @ text_k).view_as(q) + d_code_scores @ k,
            d_text_scores.transpose(-1, -2) @ flat_q,
            e.transpose(-1, -2) @ flat_g,
            d_code_scores.transpose(-1, -2) @ q,
            code_scores.transpose(-1, -2) @ g,
            None,
        )


class Attend(Protocol):
    """Attention under a mask over whole streams, or from a cache, step by step."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: [B, H, n, d] each → [B, H, n, d]."""


class Attention(nn.Module):
    """Multi-head attention; the caller passes what masks it."""

    def __init__(
        self, width: int, heads: int, head_size: int, depth: int, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.key_norm = (
            nn.RMSNorm(head_size) if qk_norm else None for _ in range(2)
        )
        self.qkv = Linear(width, 3 * heads * head_size)
        self.out = Linear(heads * head_size, width, scale=1 / math.sqrt(2 * depth))

    def forward(self, x: Tensor, attend: Attend, angles: Tensor | None = None) -> Tensor:
        """Attend: x [B, n, D] → [B, n, D].

        Args:
            attend: a mask or a cache.
            angles: rotation of queries and keys, [n, d/2]; see `dalle1.model.rotary`.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = apply_rotary(q, angles), apply_rotary(k, angles)
        y = attend(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(y.transpose(1, 2).flatten(2))
