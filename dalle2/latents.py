"""What all autoencoders of DALL·E 2 share: their grid of latents, and checks of what they read.

B batch, H W image in pixels, h w grid of latents, c latent channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

FILE_NAME = "autoencoder.safetensors"


class Latents(nn.Module):
    """A model of images whose latents lie on a square grid."""

    config: Any
    """Has the fields `image_size` and `latent_channels`."""
    downsampling: int
    """Pixels per position, along each side."""

    @property
    def image_size(self) -> int:
        """Side of its images in pixels."""
        return self.config.image_size

    @property
    def grid_size(self) -> int:
        """Positions along each side of the latents."""
        return self.config.image_size // self.downsampling

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one image's latents, (c, h, w)."""
        return self.config.latent_channels, self.grid_size, self.grid_size

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError for what is no batch of images that fit the grid."""
        factor = self.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or any(s % factor for s in images.shape[2:]):
            raise ValueError(
                f"images are {tuple(images.shape)}, expected [B, 3, H, W] with H and W multiples "
                f"of {factor}; resize or crop them first"
            )

    def check_latents(self, latents: Tensor) -> None:
        """Raise ValueError for what is no batch of latents of as many channels."""
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents are {tuple(latents.shape)}, expected [B, {self.config.latent_channels}, "
                "h, w]; use the autoencoder that the decoder was trained with"
            )
