"""Train a VQ-VAE or VQGAN, the other image tokenizer: images to codes and back.

    dalle1 train vqvae small --data toybox --out runs/vqvae

writes runs/vqvae/latest/image_tokenizer.safetensors, a log and reconstructions. The same command
resumes after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dalle1.console import one_line_errors, parse_preset
from dalle1.data.crops import Augmentation
from dalle1.data.images import to_float
from dalle1.devices import autocast
from dalle1.evaluation.reconstruction import tokenizer_metrics
from dalle1.image_tokenizer import image_tokenizer_file
from dalle1.importers.lpips import load_lpips
from dalle1.tasks.crops import CropTask, CropTrainConfig, refuse_other_architecture
from dalle1.training import distributed
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit
from dalle1.training.task import Loss
from dalle1.vqgan import VQGAN, VQGANConfig
from dalle1.vqgan.codebook import CodebookAverage
from dalle1.vqgan.losses import (
    MIN_PATCH_SIZE,
    DiscriminatorLoss,
    PatchDiscriminator,
    PerceptualVQLoss,
    PixelLoss,
    VQLoss,
    adaptive_weight,
    commitment_loss,
    hinge_loss,
    reconstruction_error,
)
from dalle1.vqgan.lpips import MIN_SIZE
from dalle1.vqgan.quantizers import NearestQuantizer


@dataclass(frozen=True, kw_only=True)
class VQVAETrainConfig(CropTrainConfig):
    """Settings of a VQ-VAE's training (van den Oord et al. 2017; VQGAN: Esser et al. 2021)."""

    model: VQGANConfig = field(default_factory=VQGANConfig)
    """Architecture of the image tokenizer."""
    pixel_loss: PixelLoss = "l1"
    """Distance of a reconstruction from its image: mean absolute or mean squared error."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss, which keeps features near their codes. Paper: 0.25."""
    codebook_decay: float = 0.99
    """Decay of the moving averages that are the codes."""
    restart_below: float = 0.03
    """Usage, as a share of the mean over codes, below which a code restarts at a random feature."""
    lpips: tuple[Path, ...] = ()
    """Local files of LPIPS, for VQGAN's perceptual loss: vgg16-397923af.pth of torchvision and
    vgg.pth of the package lpips, or a checkpoint of taming-transformers. None: no such loss."""
    lpips_weight: float = 1.0
    """Weight of the perceptual loss. VQGAN: 1."""
    adversarial_weight: float = 0.0
    """Weight of the adversarial loss of a VQGAN, beside the paper's adaptive weight. 0 trains a
    VQ-VAE. VQGAN: 0.8."""
    adversarial_start: int = 0
    """Update from which the adversarial loss counts; the discriminator trains from the start."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer."""

    @property
    def crop_multiple(self) -> int:
        return self.model.downsampling

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.quantizer == "gumbel":
            raise ValueError(
                "model.quantizer is gumbel, which is for imported models; use nearest, or train a "
                "dVAE: dalle1 train dvae"
            )
        if self.discriminator_width < 1:
            raise ValueError(
                f"discriminator_width is {self.discriminator_width}, expected 1 or more"
            )
        least = {"lpips": MIN_SIZE, "adversarial_weight": MIN_PATCH_SIZE}
        for name, size in least.items():
            if getattr(self, name) and self.crop_size < size:
                raise ValueError(
                    f"crop_size is {self.crop_size}, expected {size} or more with {name}"
                )
        for name in ("commitment_weight", "adversarial_weight", "lpips_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("codebook_decay", "restart_below"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1)")
        if self.uses_deepspeed:
            raise ValueError("train vqvae needs unsharded codes; remove --zero and --deepspeed")


# VQGAN's f16 model of 16,384 codes, without the perceptual loss.
_vqgan = VQVAETrainConfig(
    out=Path("runs/vqgan"),
    steps=1_000_000,
    batch_size=24,
    learning_rate=1e-4,
    final_learning_rate=1e-5,
    adversarial_weight=0.8,
    adversarial_start=50_000,
    weight_decay=0.0,
    beta2=0.9,
)

_small = replace(
    _vqgan,
    out=Path("runs/vqvae"),
    model=VQGANConfig(
        image_size=128,
        width=32,
        multipliers=(1, 1, 2, 2),
        blocks=1,
        attention=(),
        latent_width=64,
        code_width=64,
        codebook_size=512,
    ),
    crop_size=64,
    augmentation=Augmentation(resize=(2.0, 2.0)),
    adversarial_weight=0.0,
    adversarial_start=0,
    pixel_loss="mse",
    steps=3_000,
    batch_size=32,
    learning_rate=1e-3,
    final_learning_rate=5e-5,
    beta2=0.99,
    validation_images=1_000,
    validate_every=1_500,
)

VQVAE_PRESETS: dict[str, VQVAETrainConfig] = {"small": _small, "vqgan": _vqgan}


class VQVAETraining(nn.Module):
    """The image tokenizer, and what only its training needs."""

    def __init__(self, tokenizer: VQGAN, config: VQVAETrainConfig) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        size, width = tokenizer.config.codebook_size, tokenizer.config.code_width
        self.average = CodebookAverage(size, width, config.codebook_decay, config.restart_below)
        if config.adversarial_weight:
            self.discriminator = PatchDiscriminator(config.discriminator_width)

    def update_codes(self, features: Tensor, codes: Tensor, rng: torch.Generator) -> Tensor:
        """Update the codebook by the features of a batch; return the number of restarts."""
        assert isinstance(self.tokenizer.quantize, NearestQuantizer)  # the config refuses others
        codebook = self.tokenizer.quantize.embedding.weight
        return self.average.update(codebook, features, codes, rng)


class VQVAETask(CropTask[VQVAETraining, VQVAETrainConfig]):
    """Trains a VQ-VAE or a VQGAN."""

    def __init__(self, config: VQVAETrainConfig) -> None:
        super().__init__(config)
        self.lpips = load_lpips(config.lpips).to(self.device) if config.lpips else None

    def initial(self) -> VQVAETraining:
        """Return a new VQGAN, or load the one of --init, and what only its training needs."""
        config = self.config
        if config.init is None:
            return VQVAETraining(VQGAN(config.model), config)
        model = VQGAN.load(config.init)
        refuse_other_architecture("VQGAN", config.init, model.config, config.model)
        return VQVAETraining(model, config)

    def init_file(self, folder: Path) -> Path:
        return image_tokenizer_file(folder)

    def codec(self, model: VQVAETraining) -> VQGAN:
        return model.tokenizer

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[Loss]:
        config, tokenizer = self.config, self.model.tokenizer
        images = to_float(batch["images"])
        features = tokenizer.features(images)
        quantized, codes = tokenizer.quantize(features)
        reconstructed = tokenizer.reconstruct(quantized)
        pixels = reconstruction_error(images, reconstructed, config.pixel_loss)
        commitment = commitment_loss(features, quantized)
        perceptual = self.lpips(images, reconstructed) if self.lpips is not None else None
        visible = pixels if perceptual is None else pixels + config.lpips_weight * perceptual
        total = visible + config.commitment_weight * commitment
        restarts = self.model.update_codes(features.detach(), codes, rng)
        values = {"reconstruction": pixels, "commitment": commitment, "restarts": restarts.float()}
        parts = VQLoss(total=total, **values)
        if perceptual is not None:
            parts = PerceptualVQLoss(total=total, perceptual=perceptual, **values)
        if not config.adversarial_weight:
            return [parts]
        fooled, judged = self.adversarial(images, reconstructed)
        if step >= config.adversarial_start:
            weight = adaptive_weight(visible, fooled, tokenizer.decoder.conv_out.weight)
            parts = replace(parts, total=total + config.adversarial_weight * weight * fooled)
        return [parts, judged]

    def adversarial(
        self, images: Tensor, reconstructed: Tensor
    ) -> tuple[Tensor, DiscriminatorLoss]:
        """Return the generator's adversarial loss, and the discriminator's own loss."""
        discriminator = self.model.discriminator
        frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
        fooled = -functional_call(discriminator, frozen, (reconstructed,)).float().mean()
        real, fake = discriminator(images), discriminator(reconstructed.detach())
        return fooled, DiscriminatorLoss(total=hinge_loss(real.float(), fake.float()))

    def validate(self, model: VQVAETraining) -> Iterator[tuple[str, float]]:
        with autocast(self.device, self.config.precision):
            numbers = list(tokenizer_metrics(model.tokenizer, self.held))
        yield from numbers

    def save(self, model: VQVAETraining, folder: Path) -> None:
        model.tokenizer.save(folder)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(VQVAE_PRESETS, args, __doc__.splitlines()[0])
        with graceful_run(config):
            fit(VQVAETask(config), config)
        if distributed.is_main():
            print(f"The image tokenizer is in {config.out}")
