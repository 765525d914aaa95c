"""Attention of the joint stream, skipping what the mask hides.

B batch, H heads, T = L + N places: L of text, N = W² of the picture; d width of a head.

The skipping form arranges the codes in W blocks of W: the rows of the picture, or for a column
mask its columns. A block sees the text, itself and a few blocks before it, so that its scores are
[W, L + (back + 1)·W] and never [T, T]; one softmax runs over text and blocks together. What is
hidden inside the blocks is read off the specification in `dalle1.model.masks`.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle1.model.masks import CONV_REACH, MaskKind, image_mask, joint_mask


class Mask(nn.Module):
    """A mask in the forms in which it is used; made once for all layers of its kind."""

    whole: Tensor
    """[T, T]: who sees whom."""
    blocked: Tensor
    """[W, W, (back + 1)·W]: what place i of block r sees, of blocks r − back … r."""

    def __init__(
        self, kind: MaskKind, text_len: int, grid_size: int, conv_wrap: bool = True
    ) -> None:
        super().__init__()
        self.kind, self.text_len, self.grid_size = kind, text_len, grid_size
        self.by_column = kind == "column"
        backs = {"row": 1, "column": 0, "conv": CONV_REACH + conv_wrap, "full": grid_size - 1}
        self.back = min(backs[kind], grid_size - 1)
        whole = joint_mask(kind, text_len, grid_size, conv_wrap)
        self.register_buffer("whole", whole, persistent=False)
        mask = image_mask(kind, grid_size, conv_wrap)[None, None]
        mask = self.arrange(self.arrange(mask).transpose(-1, -2)).transpose(-1, -2)[0, 0]
        padded = F.pad(mask, (self.back * grid_size, 0))
        span = (self.back + 1) * grid_size
        rows = [
            padded[r * grid_size : (r + 1) * grid_size, r * grid_size : r * grid_size + span]
            for r in range(grid_size)
        ]
        self.register_buffer("blocked", torch.stack(rows), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend over whole streams: [B, H, T, d] each → [B, H, T, d]."""
        return attend(q, k, v, self)

    def arrange(self, x: Tensor) -> Tensor:
        """Bring codes [B, H, N, d] from raster order to that of the blocks, or back again."""
        if not self.by_column:
            return x
        return rearrange(x, "b h (r c) d -> b h (c r) d", r=self.grid_size)

    def windows(self, x: Tensor) -> Tensor:
        """Give what each block sees of the blocks: [B, H, N, d] → [B, H, W, (back + 1)·W, d]."""
        blocks = rearrange(x, "b h (n w) d -> b h n w d", w=self.grid_size)
        padded = F.pad(blocks, (0, 0, 0, 0, self.back, 0))
        shifted = [padded[:, :, i : i + self.grid_size] for i in range(self.back + 1)]
        return torch.cat(shifted, dim=-2)

    def joint(self, x: Tensor) -> Tensor:
        """Bring the codes of whole streams [B, H, T, d] to the order of the blocks, or back."""
        text, image = x.split([self.text_len, self.grid_size**2], dim=2)
        return torch.cat([text, self.arrange(image)], dim=2) if self.by_column else x

    @cached_property
    def tiles(self) -> Any:
        """The mask as FlexAttention takes it, codes in the order of the blocks."""
        from torch.nn.attention.flex_attention import create_block_mask

        whole = self.joint(self.whole[None, None].transpose(2, 3)).transpose(2, 3)
        whole = self.joint(whole)[0, 0].contiguous()

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return whole[i, j]

        return create_block_mask(sees, None, None, len(whole), len(whole), str(whole.device))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attend over whole streams, skipping what the mask hides: [B, H, T, d] each → [B, H, T, d]."""
    if mask.kind == "full":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attend_in_tiles(q, k, v, mask) if q.is_cuda else attend_in_blocks(q, k, v, mask)


def attend_in_tiles(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attend by FlexAttention, which skips the tiles that the mask hides whole."""
    arranged = (mask.joint(x) for x in (q, k, v))
    return mask.joint(_flex_attention()(*arranged, block_mask=mask.tiles))


@cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return (
        torch.compile(flex_attention, dynamic=False)
        if torch.cuda.is_available()
        else flex_attention
    )


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attend by plain matrix products over each block and the few before it."""
    length, w = mask.text_len, mask.grid_size
    q = q / math.sqrt(q.shape[-1])
    (text_q, q), (text_k, k), (text_v, v) = (
        (x[:, :, :length], mask.arrange(x[:, :, length:])) for x in (q, k, v)
    )
    scores = text_q @ text_k.transpose(-1, -2)
    ahead = ~mask.whole[:length, :length]
    text = scores.masked_fill(ahead, -torch.inf).softmax(-1).to(v.dtype) @ text_v
    q = rearrange(q, "b h (n w) d -> b h n w d", w=w)
    image = _Blocks.apply(q, text_k, text_v, mask.windows(k), mask.windows(v), ~mask.blocked)
    return torch.cat([text, mask.arrange(image.flatten(2, 3))], dim=2)


class _Blocks(torch.autograd.Function):
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
        of_text = (q.flatten(2, 3) @ text_k.transpose(-1, -2)).unflatten(2, blocks)
        seen = (q @ k.transpose(-1, -2)).masked_fill_(hidden, -torch.inf)
        top = torch.maximum(of_text.amax(-1, keepdim=True), seen.amax(-1, keepdim=True))
        total = torch.zeros_like(top, dtype=torch.float32)
        for scores in (of_text, seen):
            scores.sub_(top).exp_()
            total += scores.sum(-1, keepdim=True, dtype=torch.float32)
        out = (of_text.flatten(2, 3) @ text_v).unflatten(2, blocks) + seen @ v
        out = (out / total).to(q.dtype)
        ctx.save_for_backward(q, text_k, text_v, k, v, of_text, seen, total, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, text_k, text_v, k, v, of_text, seen, total, out = ctx.saved_tensors
        (g,) = gradients
        along = ((g * out).sum(-1, keepdim=True, dtype=torch.float32) / total).to(q.dtype)
        g = (g / total).to(q.dtype)
        flat_q, flat_g, e = q.flatten(2, 3), g.flatten(2, 3), of_text.flatten(2, 3)
        d_text = (flat_g @ text_v.transpose(-1, -2)).sub_(along.flatten(2, 3)).mul_(e)
        d_seen = (g @ v.transpose(-1, -2)).sub_(along).mul_(seen)
        return (
            (d_text @ text_k).view_as(q) + d_seen @ k,
            d_text.transpose(-1, -2) @ flat_q,
            e.transpose(-1, -2) @ flat_g,
            d_seen.transpose(-1, -2) @ q,
            seen.transpose(-1, -2) @ g,
            None,
        )


class Rotary(nn.Module):
    """Rotary positions in two dimensions: half of a head turns with the row, half with the column.

    A text place stands on the diagonal (i, i), row r and column c of the picture at (L + r, L + c);
    or at (L + r·s, L + c·s), where s brings the picture to as many places as one of `counted_on`
    codes has (position interpolation, arXiv 2306.15595).
    """

    rows: Tensor
    columns: Tensor
    """[T] each, in units of 1/W: whole numbers, which a model in fp16 keeps as they are."""

    def __init__(
        self, text_len: int, grid_size: int, head_width: int, counted_on: int | None = None
    ) -> None:
        super().__init__()
        self.unit, step = grid_size, counted_on or grid_size
        text, codes = self.unit * torch.arange(text_len), torch.arange(grid_size**2)
        first = self.unit * text_len
        rows = torch.cat([text, first + step * codes.div(grid_size, rounding_mode="floor")])
        columns = torch.cat([text, first + step * (codes % grid_size)])
        self.pairs = head_width // 4
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, places: Tensor) -> Tensor:
        """Give by how much each pair of channels is turned at places [n]: [n, d/2], in radians."""
        speeds = 10_000 ** (-torch.arange(self.pairs, device=places.device) / self.pairs)
        axes = (axis.index_select(0, places) for axis in (self.rows, self.columns))
        return torch.cat([axis[:, None] / self.unit * speeds for axis in axes], dim=-1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn queries or keys [B, H, n, d] by turns [n, d/2], or all alike by [1, d/2]."""
    (a, b), cos, sin = x.float().chunk(2, dim=-1), turns.cos(), turns.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attend(Protocol):
    """What queries see of keys and values: a mask over whole streams, or a cache, step by step."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: [B, H, n, d] each → [B, H, n, d]."""


class Attention(nn.Module):
    """Multi-head attention; what sees what is given from outside."""

    def __init__(self, width: int, heads: int, depth: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.key_norm = (
            nn.RMSNorm(width // heads) if qk_norm else None for _ in range(2)
        )
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width, scale=1 / math.sqrt(2 * depth))

    def forward(self, x: Tensor, attend: Attend, turns: Tensor | None = None) -> Tensor:
        """Attend: x [B, n, D] → [B, n, D].

        Args:
            attend: what sees what.
            turns: by how much queries and keys are turned, [n, d/2]; see `Rotary`.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        y = attend(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(y.transpose(1, 2).flatten(2))


class Linear(nn.Linear):
    """Weights from N(0, 0.125/√d_in)·scale; biases begin at 0 (Sparse Transformers, §6)."""

    def __init__(self, d_in: int, d_out: int, scale: float = 1.0) -> None:
        self.std = 0.125 / math.sqrt(d_in) * scale
        super().__init__(d_in, d_out)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)
