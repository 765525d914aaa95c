"""Who sees whom: the attention masks of the paper (§B.1, figure 11) as boolean matrices.

These functions are the specification: `mask[i, j]` says whether position i sees position j, and
never for j > i. Pictures are read in raster order, so position i lies in row i // W, column i % W.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

MaskKind = Literal["full", "row", "column", "conv"]
CONV_REACH = 5
"""An 11×11 kernel: five rows back, five columns to each side."""


def _behind(length: int) -> Tensor:
    """How many places j lies behind i: [length, length], negative where j is ahead."""
    places = torch.arange(length)
    return places[:, None] - places[None, :]


def full(length: int) -> Tensor:
    """See oneself and everything before."""
    return _behind(length) >= 0


def row(grid_size: int) -> Tensor:
    """See the last W places, as far as the same column of the row above: W + 1 with oneself."""
    behind = _behind(grid_size**2)
    return (behind >= 0) & (behind <= grid_size)


def column(grid_size: int) -> Tensor:
    """See one's own column."""
    behind = _behind(grid_size**2)
    return (behind >= 0) & (behind % grid_size == 0)


def conv(grid_size: int, reach: int = CONV_REACH, wrap: bool = True) -> Tensor:
    """See a kernel of 2·reach + 1 columns over one's own and the `reach` rows above, up to oneself.

    Args:
        wrap: at the right edge the kernel goes on at the left, one row further down, as the places
            do in raster order; else it ends at the edge.
    """
    behind = _behind(grid_size**2)
    if wrap:
        rows, columns = torch.arange(reach + 1), torch.arange(-reach, reach + 1)
        return (behind >= 0) & torch.isin(behind, (grid_size * rows[:, None] + columns).flatten())
    places = torch.arange(grid_size**2)
    above, beside = (at[:, None] - at[None, :] for at in (places // grid_size, places % grid_size))
    return (behind >= 0) & (above <= reach) & (beside.abs() <= reach)


def image_mask(kind: MaskKind, grid_size: int, conv_wrap: bool = True) -> Tensor:
    """Give the mask of that kind among the codes of a picture: [W², W²]."""
    if kind not in get_args(MaskKind):
        raise ValueError(f"mask is {kind!r}, expected one of {', '.join(get_args(MaskKind))}")
    if kind == "full":
        return full(grid_size**2)
    if kind == "conv":
        return conv(grid_size, wrap=conv_wrap)
    return {"row": row, "column": column}[kind](grid_size)


def joint_mask(kind: MaskKind, text_len: int, grid_size: int, conv_wrap: bool = True) -> Tensor:
    """Give the mask of the whole stream, text then picture: [T, T], T = text_len + W².

    Text sees the text before it, every code sees all of the text, and codes see one another as
    `kind` has it.
    """
    mask = full(text_len + grid_size**2)
    mask[text_len:, text_len:] = image_mask(kind, grid_size, conv_wrap)
    return mask


def layer_masks(depth: int) -> list[MaskKind]:
    """Name the mask of each layer: column where (i − 2) mod 4 = 0, conv last, else row (§B.1)."""
    kinds: list[MaskKind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, depth + 1)]
    return [*kinds[:-1], "conv"]
