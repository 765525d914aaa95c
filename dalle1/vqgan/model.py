"""VQGAN (Esser et al. 2021, arXiv 2012.09841): encoder, vector quantizer and decoder.

B batch, H W image in pixels, h w grid of codes (h = H / downsampling), V codebook size,
Z channels of the encoder's output, E channels of a code.

Images are [B, 3, H, W] in [0, 1]; codes are [B, h, w] integers. The names of the modules are those
of taming-transformers, so that its checkpoints load without a table of keys.

| encoder                                   | decoder                                    |
|-------------------------------------------|--------------------------------------------|
| 3×3 conv, 3 → n                           | 1×1 conv, E → Z; 3×3 conv, Z → n·last      |
| level i: residual blocks, n·multiplier[i] | residual, attention, residual              |
| stride-2 conv after every level but last  | level i: residual blocks, n·multiplier[i]  |
| residual, attention, residual             | nearest ×2 and a conv after all but 0      |
| norm, swish, 3×3 conv → Z; 1×1 conv → E   | norm, swish, 3×3 conv → 3                  |

A VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) is the same network, trained without the
adversarial loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle1.storage import load_weights, model_folder, save_weights
from dalle1.vqgan.quantizers import GumbelQuantizer, NearestQuantizer

FILE_NAME = "image_tokenizer.safetensors"
KIND = "vqgan"


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """The size of a VQGAN. The defaults are taming's f16 with 16,384 codes."""

    image_size: int = 256
    """Side of the images in pixels. The network accepts any multiple of its downsampling."""
    width: int = 128
    """Channels at full resolution, n, a multiple of 32."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level in units of the width; each level halves the resolution of the one
    before, so five levels map 16×16 pixels to a code."""
    blocks: int = 2
    """Residual blocks in each level of the encoder; the decoder's levels have one more."""
    attention: tuple[int, ...] = (4,)
    """Levels whose residual blocks are each followed by self-attention, counted from 0."""
    latent_width: int = 256
    """Channels of the encoder's output, Z."""
    code_width: int = 256
    """Channels of a code, E."""
    codebook_size: int = 16384
    """Number of codes, V."""
    quantizer: Literal["nearest", "normalized", "gumbel"] = "nearest"
    """How a code is chosen: nearest code vector; the same after both are scaled to length 1
    (LlamaGen); or argmax of logits, whose training adds Gumbel noise (DALL·E's dVAE, ru-dalle)."""
    pixel_shuffle: int = 1
    """Side of the block of pixels that one position of the decoder's output holds."""

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention"):  # JSON has lists only
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("blocks", "latent_width", "code_width", "codebook_size", "pixel_shuffle"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.width % 32 or self.width < 32:
            raise ValueError(f"width is {self.width}, expected a multiple of 32, such as 128")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers are {self.multipliers}, expected one or more from 1 up")
        if not set(self.attention) <= set(range(len(self.multipliers))):
            raise ValueError(
                f"attention is {self.attention}, expected levels from 0 to "
                f"{len(self.multipliers) - 1}"
            )
        if self.quantizer not in ("nearest", "normalized", "gumbel"):
            raise ValueError(
                f"quantizer is {self.quantizer!r}, expected nearest, normalized or gumbel"
            )
        if self.image_size % self.downsampling or self.image_size < 1:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {self.downsampling}, the "
                "pixels per code"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side, of the images that it decodes to."""
        return self.pixel_shuffle * 2 ** (len(self.multipliers) - 1)

    @property
    def grid_size(self) -> int:
        """Codes along each side of an image."""
        return self.image_size // self.downsampling


def group_norm(width: int) -> nn.GroupNorm:
    """Return the normalisation before every convolution: 32 groups."""
    return nn.GroupNorm(32, width, eps=1e-6)


class ResidualBlock(nn.Module):
    """y = shortcut(x) + conv(swish(norm(conv(swish(norm(x))))))."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = group_norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        same = width_in == width_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.nin_shortcut(x)


class AttentionBlock(nn.Module):
    """Self-attention of one head over all positions, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "b c h w -> b (h w) c") for f in (self.q, self.k, self.v))
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(y)


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if any; then a resampling."""

    def __init__(self, widths: list[int], attention: bool) -> None:
        super().__init__()
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(b) for b in widths[1:] if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


class Middle(nn.Module):
    """The lowest resolution: residual, attention, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.attn_1 = AttentionBlock(width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """A stride-2 convolution, padded on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest ×2, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [−1, 1] to features [B, Z, h, w]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (a, b) in enumerate(pairwise([config.width, *widths])):
            level = Level([a] + [b] * config.blocks, i in config.attention)
            if i < len(widths) - 1:
                level.downsample = Downsample(b)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features [B, Z, h, w] to images [B, 3, H, W], in [−1, 1] but not clamped."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.latent_width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()  # up[0] is the full resolution
        for i, (b, a) in enumerate(pairwise([*widths, widths[-1]])):
            level = Level([a] + [b] * (config.blocks + 1), i in config.attention)
            if i > 0:
                level.upsample = Upsample(b)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.pixel_shuffle**2, 3, padding=1)
        self.pixel_shuffle = config.pixel_shuffle

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.pixel_shuffle) if self.pixel_shuffle > 1 else x


class VQGAN(nn.Module):
    """Images to codes and back; an `ImageTokenizer` to stage 2."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        z, e, v = config.latent_width, config.code_width, config.codebook_size
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(z, e, 1)
        self.post_quant_conv = nn.Conv2d(e, z, 1)
        self.quantize: NearestQuantizer | GumbelQuantizer
        if config.quantizer == "gumbel":
            self.quantize = GumbelQuantizer(v, e)
        else:
            self.quantize = NearestQuantizer(v, e, normalized=config.quantizer == "normalized")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def codebook_size(self) -> int:
        """V: number of codes."""
        return self.config.codebook_size

    @property
    def downsampling(self) -> int:
        """Pixels per code, along each side."""
        return self.config.downsampling

    @property
    def image_size(self) -> int:
        """Side of its images in pixels."""
        return self.config.image_size

    @property
    def grid_size(self) -> int:
        """Codes along each side of an image."""
        return self.config.grid_size

    def features(self, images: Tensor) -> Tensor:
        """Compute what is quantized: [B, 3, H, W] in [0, 1] → [B, E, h, w], fp32."""
        factor = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or any(s % factor for s in images.shape[2:]):
            raise ValueError(
                f"images are {tuple(images.shape)}, expected [B, 3, H, W] with H and W multiples "
                f"of {factor}; resize or crop them first"
            )
        if self.config.pixel_shuffle > 1:  # the encoder reads images of the smaller size
            images = F.avg_pool2d(images, self.config.pixel_shuffle)
        x = (2 * images - 1).contiguous(memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(x)).float()

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Decode code vectors [B, E, h, w] to images [B, 3, H, W] in [0, 1], not clamped."""
        vectors = vectors.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(vectors)).float() / 2 + 0.5

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images: [B, 3, H, W] in [0, 1] → [B, h, w]."""
        return self.quantize.codes(self.features(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to images: [B, h, w] → [B, 3, H, W] in [0, 1]."""
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(
                f"codes are {codes.dtype} {tuple(codes.shape)}, expected integers [B, h, w]"
            )
        return self.reconstruct(self.quantize.vectors(codes)).clamp(0, 1)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write parameters and config to `directory`/image_tokenizer.safetensors."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype, kind=KIND)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
    ) -> VQGAN:
        """Load what `save` or a training wrote; ValueError where the file is missing or damaged.

        Args:
            directory: the folder, or the file itself.
            image_size: side of its images, if other than in training; the parameters fit any size.
        """
        path = Path(directory)
        path = path if path.is_file() else model_folder(path) / FILE_NAME
        model = load_weights(cls, VQGANConfig, path, device)
        if image_size is not None:
            model.config = replace(model.config, image_size=image_size)
        return model
