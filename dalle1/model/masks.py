"""The attention masks of the paper (§B.1, figure 11) as boolean matrices.

These functions are the specification: `mask[i, j]` is whether position i sees position j, never for
j > i. Images are in raster order: position i is row i // W, column i % W of a grid of W × W codes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

MaskKind = Literal["full", "row", "column", "conv", "conv-9", "conv-7", "line"]
CONV_REACH: dict[MaskKind, int] = {"conv": 5, "conv-9": 4, "conv-7": 3}
"""Reach of a kernel: 11 × 11 reaches five rows back, five columns to each side. Paper: 11 × 11.
RuDOLPH also has 9 × 9 and 7 × 7."""


def distance(length: int) -> Tensor:
    """Return how far j is behind i: [length, length], negative where j is ahead."""
    positions = torch.arange(length)
    return positions[:, None] - positions[None, :]


def full(length: int) -> Tensor:
    """See oneself and everything before."""
    return distance(length) >= 0


def row(grid_size: int) -> Tensor:
    """See the last W positions, up to the same column of the row above: W + 1 with oneself."""
    distances = distance(grid_size**2)
    return (distances >= 0) & (distances <= grid_size)


def column(grid_size: int) -> Tensor:
    """See one's own column."""
    distances = distance(grid_size**2)
    return (distances >= 0) & (distances % grid_size == 0)


def line(grid_size: int) -> Tensor:
    """See what is left of oneself in one's own row. Paper: none; DALLE-pytorch's row mask."""
    rows = torch.arange(grid_size**2) // grid_size
    return (distance(grid_size**2) >= 0) & (rows[:, None] == rows[None, :])


def conv(grid_size: int, reach: int = CONV_REACH["conv"], wrap: bool = True) -> Tensor:
    """See a kernel of 2·reach + 1 columns over one's own and the `reach` rows above, up to oneself.

    Args:
        wrap: beyond the right edge the kernel continues at the left, one row further down, as
            positions do in raster order; otherwise it ends at the edge.
    """
    distances = distance(grid_size**2)
    if wrap:
        rows, columns = torch.arange(reach + 1), torch.arange(-reach, reach + 1)
        return (distances >= 0) & torch.isin(
            distances, (grid_size * rows[:, None] + columns).flatten()
        )
    positions = torch.arange(grid_size**2)
    axes = positions // grid_size, positions % grid_size
    above, beside = (axis[:, None] - axis[None, :] for axis in axes)
    return (distances >= 0) & (above <= reach) & (beside.abs() <= reach)


def image_mask(kind: MaskKind, grid_size: int, conv_wrap: bool = True) -> Tensor:
    """Return the mask of that kind among the codes of an image: [W², W²]."""
    if kind not in get_args(MaskKind):
        raise ValueError(f"mask is {kind!r}, expected one of {', '.join(get_args(MaskKind))}")
    if kind == "full":
        return full(grid_size**2)
    if kind in CONV_REACH:
        return conv(grid_size, CONV_REACH[kind], conv_wrap)
    return {"row": row, "column": column, "line": line}[kind](grid_size)


def joint_mask(kind: MaskKind, text_len: int, grid_size: int, conv_wrap: bool = True) -> Tensor:
    """Return the mask of the whole stream, text then image: [T, T], T = text_len + W².

    Text sees the text before it, every code sees all of the text, and codes see each other as
    `kind` defines.
    """
    mask = full(text_len + grid_size**2)
    mask[text_len:, text_len:] = image_mask(kind, grid_size, conv_wrap)
    return mask


def layer_masks(depth: int) -> list[MaskKind]:
    """Return the mask of each layer: column where (i − 2) mod 4 = 0, conv last, else row (§B.1)."""
    kinds: list[MaskKind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, depth + 1)]
    return [*kinds[:-1], "conv"]
