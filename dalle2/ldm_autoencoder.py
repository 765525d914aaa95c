"""The KL autoencoder of latent diffusion (Rombach et al. 2022), as Stable Diffusion has it.

B batch, H W image in pixels, h w grid of latents (h = H / downsampling), c latent channels.
Images are [B, 3, H, W] in [0, 1]; latents are [B, c, h, w], of variance near 1.

It is not trained here: `dalle1 import vae` converts published ones, and those that diffusers
trained. The networks are VQGAN's, which ends in mean and log-variance instead of codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle1.storage import save_weights
from dalle1.vqgan.model import Decoder, Encoder, VQGANConfig
from dalle2.latents import FILE_NAME, Latents

KIND = "ldm"


@dataclass(frozen=True, kw_only=True)
class LDMAutoencoderConfig:
    """The size of an autoencoder. The defaults are Stable Diffusion's."""

    image_size: int = 512
    """Side of the images in pixels. The network accepts any multiple of its downsampling."""
    width: int = 128
    """Channels at full resolution, a multiple of 32."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level in widths; each level halves the resolution of the one before."""
    blocks: int = 2
    """Residual blocks in each level of the encoder; the decoder's levels have one more."""
    latent_channels: int = 4
    """Numbers at each position of the grid, c."""
    scaling_factor: float = 0.18215
    """Factor that gives latents the variance 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # metadata has lists
        if self.latent_channels < 1:
            raise ValueError(f"latent_channels is {self.latent_channels}, expected at least 1")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}, expected more than 0")
        self.network(1)  # checks the other sizes

    def network(self, channels: int) -> VQGANConfig:
        """Return the config of VQGAN's networks with `channels` between them."""
        return VQGANConfig(
            image_size=self.image_size,
            width=self.width,
            multipliers=self.multipliers,
            blocks=self.blocks,
            attention=(),
            latent_width=channels,
        )


class LDMAutoencoder(Latents):
    """Images to latents and back."""

    def __init__(self, config: LDMAutoencoderConfig) -> None:
        super().__init__()
        self.config, self.downsampling = config, 2 ** (len(config.multipliers) - 1)
        c = config.latent_channels
        self.encoder, self.decoder = Encoder(config.network(2 * c)), Decoder(config.network(c))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images as latents [B, c, h, w]: the posterior's mean, scaled."""
        self.check_images(images)
        mean, _ = self.quant_conv(self.encoder(2 * images - 1)).float().chunk(2, dim=1)
        return mean * self.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, c, h, w] to images [B, 3, H, W] in [0, 1]."""
        return self.reconstruct(latents)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Decode latents as `decode` does, with gradients."""
        self.check_latents(latents)
        vectors = self.post_quant_conv(latents / self.config.scaling_factor)
        return (self.decoder(vectors).float() / 2 + 0.5).clamp(0, 1)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the parameters and config to `directory`/autoencoder.safetensors."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype, kind=KIND)
