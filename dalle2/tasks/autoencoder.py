"""Train a KL autoencoder, in whose latents the decoder of DALL·E 2 diffuses.

    dalle1 train autoencoder small --data toybox --out runs/autoencoder

writes runs/autoencoder/latest/autoencoder.safetensors, a log and reconstructions. The same command
resumes after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dalle1.console import one_line_errors, parse_preset
from dalle1.data.crops import Augmentation
from dalle1.data.images import to_float
from dalle1.devices import autocast
from dalle1.image_tokenizer import image_tokenizer_file
from dalle1.tasks.crops import CropTask, CropTrainConfig, refuse_other_architecture
from dalle1.training import distributed
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit
from dalle2.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderLoss,
    autoencoder_digest,
)
from dalle2.bundled import name_folders
from dvae import DVAE, Distortion
from dvae.losses import psnr


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig(CropTrainConfig):
    """Settings of an autoencoder's training (Rombach et al. 2022)."""

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Architecture of the autoencoder."""
    init: Path | None = None
    """Folder of an autoencoder of the same architecture to fine-tune, "unclip" for the bundled one,
    or of a dVAE whose residual groups are taken over."""
    decoder_only: bool = False
    """Whether only the decoder is trained, of the autoencoder of --init: latents stay the same, so
    embedded data and the decoders of DALL·E 2 that were trained on it fit as before."""
    crop_size: int = 64
    """Side of the random training crops in pixels, a multiple of 8."""
    distortion: Distortion = "logit-laplace"
    """Distance of a reconstruction from its image."""
    mse_weight: float = 300.0
    """Weight of the mean squared error, added to the distortion."""
    kl_weight: float = 0.1
    """Weight of the KL divergence to N(0, 1); 1 is the ELBO. Latent diffusion uses little of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name_folders(self, "init")
        for name in ("mse_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.decoder_only and self.init is None:
            raise ValueError("decoder_only needs --init FOLDER, the autoencoder to fine-tune")
        if self.decoder_only and self.uses_deepspeed:
            raise ValueError(
                "decoder_only keeps the encoder as it is, which --zero and --deepspeed do not "
                "support; use --zero 0"
            )
        if self.model.encoder_of:
            raise ValueError("model.encoder_of is set by --decoder-only alone; leave it out")


_small = AutoencoderTrainConfig(
    out=Path("runs/autoencoder"),
    model=AutoencoderConfig(latent_channels=8),
    augmentation=Augmentation(resize=(2.0, 2.0)),
    steps=4_000,
    batch_size=32,
    learning_rate=2e-3,
    final_learning_rate=5e-5,
    beta2=0.98,
    validate_every=500,
)

# Latent diffusion's f = 8 at 256 pixels, with the dVAE's blocks.
_base = replace(
    _small,
    model=AutoencoderConfig(
        image_size=256, width=128, blocks_per_group=2, code_width=128, residual_gain=None
    ),
    crop_size=256,
    augmentation=Augmentation(),
    steps=400_000,
    learning_rate=1e-4,
    final_learning_rate=1e-6,
    warmup_steps=1_000,
    beta2=0.999,
)

AUTOENCODER_PRESETS: dict[str, AutoencoderTrainConfig] = {"small": _small, "base": _base}


class AutoencoderTask(CropTask[Autoencoder, AutoencoderTrainConfig]):
    """Trains a KL autoencoder."""

    def init_file(self, folder: Path) -> Path:
        """Return the file that --init names: an autoencoder's, or else a dVAE's."""
        own = Autoencoder.file_in(folder)
        return own if own.is_file() else image_tokenizer_file(folder)

    def initial(self) -> Autoencoder:
        """Return a new autoencoder, or one that starts from --init."""
        config = self.config
        if config.init is None:
            return Autoencoder(config.model)
        if Autoencoder.file_in(config.init).is_file():
            model = Autoencoder.load(config.init)
        elif config.decoder_only:
            raise ValueError(
                f"decoder_only needs an autoencoder in --init, and {config.init} has none"
            )
        else:
            model = Autoencoder.from_dvae(DVAE.load(config.init), config.model.latent_channels)
        sizes = model.config, config.model
        ignored = ("image_size", "encoder_of")  # its parameters fit any image size
        refuse_other_architecture("model", config.init, *sizes, ignored=ignored)
        model.config = config.model
        if config.decoder_only:
            model.encoder.requires_grad_(False)
            model.config = replace(model.config, encoder_of=autoencoder_digest(config.init))
        return model

    def measure(self, model: Autoencoder) -> None:
        """Measure the latents of the validation images, unless they have to stay the same."""
        if not self.config.decoder_only:
            model.measure(self.held)

    def refuse_other_latents(self, model: Autoencoder) -> None:
        """Raise ValueError where --init has changed since the training began."""
        assert self.config.init is not None
        now, start = model.state_dict(), Autoencoder.load(self.config.init).state_dict()
        names = [name for name in start if name.startswith(("encoder.", "latent_"))]
        if not all(now[name].cpu().equal(start[name]) for name in names):
            raise ValueError(
                f"the autoencoder in {self.config.init} has changed since this training of its "
                "decoder began; use another --out"
            )

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[AutoencoderLoss]:
        return [self.loss(self.model, to_float(batch["images"]), rng)]

    def loss(
        self, model: Autoencoder, images: Tensor, rng: torch.Generator | None
    ) -> AutoencoderLoss:
        """Compute the loss on images; without `rng`, of the mean latents."""
        c = self.config
        weights = {"kl_weight": c.kl_weight, "mse_weight": c.mse_weight}
        return model.loss(images, rng, distortion=c.distortion, **weights)

    @torch.no_grad()
    def validate(self, model: Autoencoder) -> Iterator[tuple[str, float]]:
        """Yield the PSNR of reconstructions in dB, and the KL in nats per latent value."""
        self.measure(model)
        ratios, kls = [], []
        for images in self.held.split(16):
            with autocast(self.device, self.config.precision):
                ratios.append(psnr(images, model.decode(model.encode(images)).float()))
                kls.append(float(self.loss(model, images, None).kl) * len(images))
        yield "psnr", float(torch.cat(ratios).mean())
        yield "kl", sum(kls) / len(self.held)

    def save(self, model: Autoencoder, folder: Path) -> None:
        self.measure(model.to(self.device))
        if self.config.decoder_only:
            self.refuse_other_latents(model)
        model.save(folder)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(AUTOENCODER_PRESETS, args, __doc__.splitlines()[0])
        with graceful_run(config):
            fit(AutoencoderTask(config), config)
        if distributed.is_main():
            print(f"The autoencoder is in {config.out}")
