"""A KL autoencoder: images to a small grid of continuous latents and back (Rombach et al. 2022).

B batch, H W image in pixels, h w grid of latents (h = H / 8), c latent channels.
Images are [B, 3, H, W] in [0, 1]; latents are [B, c, h, w], of mean 0 and variance 1 per channel.

The networks are the dVAE's: where it has the logits of V codes, this has the mean and the
log-variance of c numbers; where it embeds codes, this multiplies the numbers by a matrix.
Paper: diffusion in pixels. Here in latents: an update takes a fraction of the time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from dalle1.storage import (
    load_config,
    load_weights,
    model_folder,
    read_kind,
    save_weights,
    weights_digest,
)
from dalle2.latents import FILE_NAME, Latents
from dalle2.ldm_autoencoder import KIND as LDM
from dalle2.ldm_autoencoder import LDMAutoencoder, LDMAutoencoderConfig
from dvae.losses import Distortion, distortion_of, squeeze_pixels
from dvae.model import DOWNSAMPLING, DVAE, Decoder, DVAEConfig, Encoder, reconstruction

MAX_LOG_VARIANCE = 10.0


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The size of an autoencoder."""

    image_size: int = 128
    """Side of the images in pixels, a multiple of 8. The network itself accepts any such size."""
    width: int = 32
    """Channels at full resolution, a multiple of 4; deeper groups have 2, 4 and 8 times as many."""
    blocks_per_group: int = 1
    """Residual blocks in each of the four groups."""
    latent_channels: int = 4
    """Numbers at each position of the grid, c."""
    code_width: int = 64
    """Channels at the decoder's input."""
    residual_gain: float | None = 0.25
    """Factor on each residual path. None: 1 / (number of blocks)²."""
    min_log_scale: float | None = -2.0
    """Floor on ln b of the likelihood, as in the dVAE. None: no floor."""
    encoder_of: str = ""
    """Digest of the autoencoder whose latents it shares, as only its decoder was trained."""

    def __post_init__(self) -> None:
        if self.latent_channels < 1:
            raise ValueError(f"latent_channels is {self.latent_channels}, expected at least 1")
        self.network(self.latent_channels)  # checks the other sizes

    def network(self, channels: int) -> DVAEConfig:
        """Return the config of the dVAE's networks with `channels` in place of its V codes."""
        return DVAEConfig(
            image_size=self.image_size,
            width=self.width,
            blocks_per_group=self.blocks_per_group,
            codebook_size=channels,
            code_width=self.code_width,
            residual_gain=self.residual_gain,
            min_log_scale=self.min_log_scale,
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """What `Autoencoder.loss` returns; every field is a scalar tensor, a mean over the batch."""

    total: Tensor
    """What is minimized, per colour value."""
    distortion: Tensor
    """Reconstruction error per colour value."""
    mse: Tensor
    """Mean squared error per colour value."""
    kl: Tensor
    """KL(q ‖ N(0, 1)), in nats per latent value."""


class Autoencoder(Latents):
    """Images to latents and back."""

    downsampling = DOWNSAMPLING
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config.network(2 * channels))
        self.decoder = Decoder(config.network(channels))
        # What `measure` found; latents are normalized by it, so that diffusion starts from
        # variance 1.
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def from_dvae(cls, dvae: DVAE, latent_channels: int) -> Autoencoder:
        """Return an autoencoder with the residual groups of a trained dVAE, and new ends."""
        size = dvae.config
        names = ("image_size", "width", "blocks_per_group", "code_width")
        model = cls(
            AutoencoderConfig(
                latent_channels=latent_channels,
                residual_gain=size.residual_gain,
                min_log_scale=size.min_log_scale,
                **{name: getattr(size, name) for name in names},
            )
        )
        ends = ("encoder.output.", "decoder.input.")
        state = {k: v for k, v in dvae.state_dict().items() if not k.startswith(ends)}
        model.load_state_dict(state, strict=False)
        return model

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log-variance of q(z | image), before normalization."""
        self.check_images(images)
        stats = rearrange(self.encoder(squeeze_pixels(images)), "b h w c -> b c h w")
        mean, log_variance = stats.float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, MAX_LOG_VARIANCE)

    def decoded(self, latents: Tensor) -> Tensor:
        """Return the likelihood's parameters [B, 6, H, W] of latents before normalization."""
        return self.decoder(rearrange(latents, "b c h w -> b h w c"))

    def loss(
        self,
        images: Tensor,
        rng: torch.Generator | None = None,
        *,
        kl_weight: float = 1.0,
        mse_weight: float = 0.0,
        distortion: Distortion = "logit-laplace",
    ) -> AutoencoderLoss:
        """Compute the negative ELBO per colour value, with weights as in the dVAE's loss.

        Args:
            rng: generator of the latents' noise; None decodes their mean.
            kl_weight: weight of the KL; 1 is the ELBO.
            mse_weight: weight of the mean squared error, added to the distortion.
        """
        mean, log_variance = self.posterior(images)
        z = mean
        if rng is not None:
            noise = torch.randn(mean.shape, generator=rng, device=mean.device)
            z = mean + (log_variance / 2).exp() * noise
        stats = self.decoded(z)
        error, squared = (
            distortion_of(images, stats, distortion),
            distortion_of(images, stats, "mse"),
        )
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        total = error + mse_weight * squared + kl_weight * kl * mean.numel() / images.numel()
        return AutoencoderLoss(total=total, distortion=error, mse=squared, kl=kl)

    @torch.no_grad()
    def measure(self, images: Tensor, batch_size: int = 32) -> None:
        """Store the mean and the standard deviation of these images' latents, by channel."""
        parts = [self.posterior(part)[0] for part in images.split(batch_size)]
        values = rearrange(torch.cat(parts), "b c h w -> c (b h w)")
        self.latent_mean.copy_(values.mean(1))
        self.latent_std.copy_(values.std(1).clamp_min(1e-6))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images as latents [B, c, h, w]: the posterior's mean, normalized."""
        mean, scale = (x.view(-1, 1, 1) for x in (self.latent_mean, self.latent_std))
        return (self.posterior(images)[0] - mean) / scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, c, h, w] to images [B, 3, H, W] in [0, 1]."""
        return self.reconstruct(latents)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Decode latents as `decode` does, with gradients."""
        self.check_latents(latents)
        mean, scale = (x.view(-1, 1, 1) for x in (self.latent_mean, self.latent_std))
        return reconstruction(self.decoded(latents * scale + mean))

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the parameters and config to `directory`/autoencoder.safetensors."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype, kind="autoencoder")

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
    ) -> Autoencoder:
        """Load what `save` or a training wrote; ValueError where the file is missing or damaged.

        Args:
            image_size: side of its images, if other than in training; the parameters fit any size.
        """
        if kind_of(directory) == LDM:
            raise ValueError(
                f"the autoencoder in {directory} is Stable Diffusion's, expected one that `dalle1 "
                "train autoencoder` trained; that is not trained further here"
            )
        model = load_weights(cls, AutoencoderConfig, cls.file_in(directory), device)
        if image_size is not None:
            model.config = replace(model.config, image_size=image_size)
        return model

    @classmethod
    def config_of(cls, directory: str | Path) -> AutoencoderConfig:
        """Read the config of the model that `load` returns."""
        return load_config(cls, AutoencoderConfig, cls.file_in(directory))

    @staticmethod
    def file_in(directory: str | Path) -> Path:
        """Return the model's file in a model folder or a training's folder."""
        return model_folder(directory) / FILE_NAME


PIXELS = "pixels"
"""Name instead of a folder, for a decoder that works on pixels."""


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """The size of images that are not encoded."""

    image_size: int = 64
    """Side of the images in pixels. Paper: 64."""
    latent_channels: int = 3
    """Red, green and blue."""


class Pixels(Latents):
    """The paper's way: no autoencoder. The latents are the pixels, in [−1, 1]."""

    downsampling = 1
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("latent_mean", torch.full((3,), 0.5))
        self.register_buffer("latent_std", torch.full((3,), 0.5))

    def encode(self, images: Tensor) -> Tensor:
        """Scale images in [0, 1] to [−1, 1]."""
        return (images - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Scale pixels in [−1, 1] to [0, 1]."""
        scaled = latents * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)
        return scaled.clamp(0, 1)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Scale pixels as `decode` does, with gradients."""
        return self.decode(latents)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the config to `directory`/autoencoder.safetensors."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype, kind=PIXELS)


AnyAutoencoder = Autoencoder | LDMAutoencoder | Pixels


def kind_of(directory: str | Path) -> str | None:
    """Return the kind of autoencoder in a folder; None where the folder has none."""
    path = Autoencoder.file_in(directory)
    if str(directory) == PIXELS:
        return PIXELS
    return read_kind(path) if path.is_file() else None


def load_autoencoder(
    directory: str | Path, device: str | torch.device = "cpu", image_size: int | None = None
) -> AnyAutoencoder:
    """Load an autoencoder, or for "pixels" what passes pixels on.

    Args:
        image_size: side of its images; None is that of the training, and 64 for pixels.
    """
    kind, path = kind_of(directory), Autoencoder.file_in(directory)
    if str(directory) == PIXELS:
        return Pixels(PixelsConfig(image_size=image_size or PixelsConfig.image_size)).to(device)
    if kind == PIXELS:
        return load_weights(Pixels, PixelsConfig, path, device)
    if kind != LDM:
        return Autoencoder.load(directory, device, image_size)
    model = load_weights(LDMAutoencoder, LDMAutoencoderConfig, path, device)
    if image_size is not None:
        model.config = replace(model.config, image_size=image_size)
    return model


def autoencoder_digest(directory: str | Path) -> str:
    """Return a hash by which decoders know an autoencoder's latents: that of its weights.

    An autoencoder of which only the decoder was trained keeps the hash of the one that it was.
    """
    kind = kind_of(directory)
    if kind == PIXELS:
        return PIXELS
    if kind != LDM and (shared := Autoencoder.config_of(directory).encoder_of):
        return shared
    return weights_digest(Autoencoder.file_in(directory))
