"""Order and extent of the blocks in which sparse attention is computed: indices only.

B batch, H heads, T = L + N positions: L of text, N = W² of the image; d width of a head.

The codes lie in W blocks of W: the rows of the image, or its columns for a column mask. A block
attends to the text, itself and a few blocks before it. What is hidden inside the blocks is read
off the specification in `dalle1.model.masks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dalle1.model.masks import CONV_REACH, MaskKind, image_mask, joint_mask


@dataclass(frozen=True)
class SparseLayout:
    """The blocks of one kind of mask."""

    kind: MaskKind
    text_len: int
    grid_size: int
    conv_wrap: bool = True

    @property
    def by_column(self) -> bool:
        """Whether the blocks are columns of the image, not rows."""
        return self.kind == "column"

    @property
    def back(self) -> int:
        """Number of earlier blocks that a block attends to."""
        reach = {"row": 1, "column": 0, "line": 0}
        reach |= {kind: rows + self.conv_wrap for kind, rows in CONV_REACH.items()}
        return min(reach.get(self.kind, self.grid_size - 1), self.grid_size - 1)

    def to_blocks(self, x: Tensor) -> Tensor:
        """Reorder codes [B, H, N, d] from raster order to block order, or back."""
        if not self.by_column:
            return x
        return rearrange(x, "b h (r c) d -> b h (c r) d", r=self.grid_size)

    def permute_stream(self, x: Tensor) -> Tensor:
        """Reorder the codes of whole streams [B, H, T, d] to block order, or back."""
        text, image = x.split([self.text_len, self.grid_size**2], dim=2)
        return torch.cat([text, self.to_blocks(image)], dim=2) if self.by_column else x

    def windows(self, x: Tensor) -> Tensor:
        """Return the blocks that each block attends to: [B, H, N, d] → [B, H, W, (back+1)·W, d]."""
        blocks = rearrange(x, "b h (n w) d -> b h n w d", w=self.grid_size)
        padded = F.pad(blocks, (0, 0, 0, 0, self.back, 0))
        shifted = [padded[:, :, i : i + self.grid_size] for i in range(self.back + 1)]
        return torch.cat(shifted, dim=-2)

    def dense(self) -> Tensor:
        """Return the mask of whole streams in raster order: [T, T]."""
        return joint_mask(self.kind, self.text_len, self.grid_size, self.conv_wrap)

    def block_mask(self) -> Tensor:
        """Return what position i of block r sees of blocks r − back … r: [W, W, (back+1)·W]."""
        mask, w = image_mask(self.kind, self.grid_size, self.conv_wrap)[None, None], self.grid_size
        mask = self.to_blocks(self.to_blocks(mask).transpose(-1, -2)).transpose(-1, -2)[0, 0]
        padded, span = F.pad(mask, (self.back * w, 0)), (self.back + 1) * w
        rows = [padded[r * w : (r + 1) * w, r * w : r * w + span] for r in range(w)]
        return torch.stack(rows)
