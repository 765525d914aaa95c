"""The dVAE of DALLE-pytorch: strided convolutions with ReLU, under its own parameter names.

B batch, H W image in pixels, h w grid of codes (h = H / 2^layers), V codebook size. Imported models
use it; `dvae` has the paper's. Source: lucidrains/DALLE-pytorch dalle_pytorch/dalle_pytorch.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from dalle1.storage import load_weights, model_folder, save_weights

FILE_NAME = "image_tokenizer.safetensors"
KIND = "strided-dvae"


@dataclass(frozen=True, kw_only=True)
class StridedDVAEConfig:
    """Sizes of the model."""

    image_size: int = 256
    """Side of its images in pixels."""
    width: int = 64
    """Channels of the layers."""
    layers: int = 3
    """Convolutions of stride 2 in the encoder."""
    blocks: int = 0
    """Residual blocks in the encoder, and in the decoder."""
    codebook_size: int = 512
    """V: number of codes."""
    code_width: int = 512
    """Channels of a code's vector."""


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x


class StridedDVAE(nn.Module):
    """Images to codes and back; an `ImageTokenizer` to stage 2."""

    def __init__(self, config: StridedDVAEConfig) -> None:
        super().__init__()
        self.config = c = config
        self.codebook = nn.Embedding(c.codebook_size, c.code_width)
        first = c.width if c.blocks else c.code_width
        down, up = [3, *[c.width] * c.layers], [first, *[c.width] * c.layers]
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU())
                for a, b in pairwise(down)
            ),
            *(_Block(c.width) for _ in range(c.blocks)),
            nn.Conv2d(c.width, c.codebook_size, 1),
        )
        self.decoder = nn.Sequential(
            *([nn.Conv2d(c.code_width, c.width, 1)] if c.blocks else []),
            *(_Block(c.width) for _ in range(c.blocks)),
            *(
                nn.Sequential(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.ReLU())
                for a, b in pairwise(up)
            ),
            nn.Conv2d(c.width, 3, 1),
        )

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def downsampling(self) -> int:
        return 1 << self.config.layers

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def grid_size(self) -> int:
        return self.image_size // self.downsampling

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [0, 1] as codes [B, h, w]."""
        hidden = self.encoder[:-1](2 * images - 1)
        with torch.autocast(images.device.type, enabled=False):  # bf16 rounds logits to ties
            return self.encoder[-1](hidden.float()).argmax(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, h, w] to images [B, 3, H, W] in [0, 1]."""
        vectors = rearrange(self.codebook(codes), "b h w d -> b d h w")
        return (self.decoder(vectors) / 2 + 0.5).clamp(0, 1)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write parameters and config to one file in `directory`, rounded to `dtype`."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype, KIND)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
    ) -> StridedDVAE:
        """Load what `save` wrote; ValueError where the file is missing or damaged."""
        path = Path(directory)
        path = path if path.is_file() else model_folder(path) / FILE_NAME
        model = load_weights(cls, StridedDVAEConfig, path, device)
        if image_size is not None:
            model.config = replace(model.config, image_size=image_size)
        return model
