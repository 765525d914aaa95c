"""Rotary positions in two dimensions (RoFormer, arXiv 2104.09864).

B batch, H heads, T = L + N positions: L of text, N = W² of the image; d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotation angles: half of a head turns with the row, the other half with the column.

    Text position i has row and column i; the code in row r, column c has (L + r, L + c). With a
    `base_grid` of W₀ codes a side it has (L + r·s, L + c·s), s = W₀/W: then an image of any grid
    spans the positions of the smaller one (position interpolation, arXiv 2306.15595).
    """

    rows: Tensor
    columns: Tensor
    """[T] each, in units of 1/W: whole numbers, which fp16 represents exactly."""

    def __init__(
        self, text_len: int, grid_size: int, head_width: int, base_grid: int | None = None
    ) -> None:
        super().__init__()
        self.unit, step = grid_size, base_grid or grid_size
        with torch.device("cpu"):  # see `MaskedAttention`
            text, codes = self.unit * torch.arange(text_len), torch.arange(grid_size**2)
        first = self.unit * text_len
        rows = torch.cat([text, first + step * codes.div(grid_size, rounding_mode="floor")])
        columns = torch.cat([text, first + step * (codes % grid_size)])
        self.pairs = head_width // 4
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the angle in radians of each pair of channels at positions [n]: [n, d/2]."""
        channels = torch.arange(self.pairs, dtype=dtype, device=positions.device)
        frequencies = 10_000 ** (-channels / self.pairs)
        axes = (axis.index_select(0, positions).to(dtype) for axis in (self.rows, self.columns))
        return torch.cat([axis[:, None] / self.unit * frequencies for axis in axes], dim=-1)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate queries or keys [B, H, n, d] by angles [n, d/2], or all by the same [1, d/2].

    Angles are in fp32, or in fp64 for a model in fp64.
    """
    (a, b), cos, sin = x.to(angles.dtype).chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
