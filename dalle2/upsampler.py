"""The upsampler (§2.1): a U-Net that adds detail to an enlarged image, without caption or CLIP.

B batch, f factor, h w sides of the small image. Images are in [0, 1], the network's in [−1, 1].

    small image [B, 3, h, w] ─ enlarged, bilinear ─┐
    x_t [B, 3, f·h, f·w] ──────────────────────────┴─ concatenated ─ U-Net ─ prediction

It has no attention. So it is trained on crops, and enlarges whole images. In training, half of the
small images are blurred: else it would trust details that a decoder gets wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.storage import load_config, load_weights, model_folder, save_weights
from dalle2.decoder import unet_denoiser
from dalle2.diffusion.noise import CandidateNoise
from dalle2.diffusion.samplers import SamplerName, sample
from dalle2.unet import UNet, UNetArch, UNetConfig

FILE_NAME = "upsampler.safetensors"
BLUR_KERNEL, BLUR_SIGMA = 3, 0.6
"""Size and σ of the blur, in pixels of the small image. Paper: the same."""


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig(UNetArch):
    """The size of an upsampler."""

    width: int = 24
    """Channels at full resolution, a multiple of 8. Paper: 320."""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """Channels of each level, in widths; every level halves the sides. Paper: 1 2 3 4."""
    attention: tuple[int, ...] = ()
    """None: attention would depend on the size of the images."""
    image_size: int = 256
    """Side of the upsampled images in pixels. The network itself accepts others."""
    factor: int = 2
    """Side of an upsampled image in sides of the small one. Paper: 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention:
            raise ValueError(f"attention is {self.attention}, expected none in an upsampler")
        if self.factor < 2 or self.image_size % self.factor:
            raise ValueError(
                f"factor is {self.factor}, expected a divisor of image_size, {self.image_size}, "
                "from 2 up"
            )
        self.unet  # noqa: B018  checks the sides

    @property
    def unet(self) -> UNetConfig:
        """Config of the U-Net."""
        arch = {field.name: getattr(self, field.name) for field in fields(UNetArch)}
        return UNetConfig(**arch, channels=3, concat_channels=3, side=self.image_size, pixels=True)


def reduced(images: Tensor, factor: int) -> Tensor:
    """Return images [B, 3, H, W] with sides divided by `factor`: means of squares of pixels."""
    return F.avg_pool2d(images, factor)


def blurred(images: Tensor) -> Tensor:
    """Blur images [B, 3, h, w] by a Gaussian."""
    offsets = torch.arange(BLUR_KERNEL, device=images.device) - BLUR_KERNEL // 2
    line = torch.exp(-(offsets**2) / (2 * BLUR_SIGMA**2)).to(images)
    line = (line / line.sum()).repeat(images.shape[1], 1, 1)
    padded = F.pad(images, (BLUR_KERNEL // 2,) * 4, mode="replicate")
    channels = images.shape[1]
    columns = F.conv2d(padded, line[:, :, :, None], groups=channels)
    return F.conv2d(columns, line[:, :, None, :], groups=channels)


class Upsampler(nn.Module):
    """Enlarges images by a factor."""

    muon_modules = UNet.muon_modules

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet)

    def enlarged(self, small: Tensor) -> Tensor:
        """Return small images, enlarged bilinearly: [B, 3, h, w] → [B, 3, f·h, f·w]."""
        return F.interpolate(small, scale_factor=float(self.config.factor), mode="bilinear")

    def forward(self, x: Tensor, t: Tensor, small: Tensor) -> Tensor:
        """Predict [B, 3, f·h, f·w] of x_t at times t [B], beside small images in [0, 1]."""
        return self.unet(x, t, beside=2 * self.enlarged(small) - 1)

    @torch.no_grad()
    def upsample(
        self,
        images: Tensor,
        candidates: Sequence[int],
        *,
        seed: int = 0,
        steps: int = 8,
        sampler: SamplerName = "ddim",
    ) -> Tensor:
        """Enlarge images [B, 3, h, w] in [0, 1] to [B, 3, f·h, f·w]; paper: 27 steps of DDIM.

        Args:
            candidates: number of each image, which decides its noise.
        """
        factor, multiple = self.config.factor, 1 << (len(self.config.multipliers) - 1)
        height, width = (factor * side for side in images.shape[2:])
        if height % multiple or width % multiple:
            raise ValueError(
                f"upsampled images are {height} × {width}, expected multiples of {multiple}"
            )
        noise = CandidateNoise(seed, candidates, (3, height, width), "upsampler", images.device)
        denoise = unet_denoiser(self.unet.config, lambda x, t: self(x, t, images))
        x = sample(denoise.schedule, denoise, noise, steps=steps, sampler=sampler)
        return ((x + 1) / 2).clamp(0, 1)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the parameters and config to `directory`/upsampler.safetensors."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> Upsampler:
        """Load what `save` or a training wrote; ValueError where it is missing or damaged."""
        return load_weights(cls, UpsamplerConfig, cls.file_in(directory), device)

    @classmethod
    def config_of(cls, directory: str | Path) -> UpsamplerConfig:
        """Read the config of the model that `load` returns."""
        return load_config(cls, UpsamplerConfig, cls.file_in(directory))

    @staticmethod
    def file_in(directory: str | Path) -> Path:
        """Return the model's file in a model folder or a training's folder."""
        return model_folder(directory) / FILE_NAME
