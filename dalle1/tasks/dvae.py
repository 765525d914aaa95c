"""Train a dVAE, which maps images to a grid of codes and back (stage 1; paper §2.1, A).

    dalle1 train dvae toy --data toybox --out runs/dvae

writes runs/dvae/latest/dvae.safetensors, a log and reconstructions. The same command resumes
after an interruption.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dalle1.console import one_line_errors, parse_preset
from dalle1.data import Example, Sample
from dalle1.data.crops import Augmentation
from dalle1.data.images import to_float
from dalle1.devices import autocast
from dalle1.evaluation.reconstruction import reconstruction_metrics
from dalle1.image_tokenizer import image_tokenizer_file
from dalle1.tasks.crops import CropTask, CropTrainConfig, crop, refuse_other_architecture
from dalle1.training import distributed
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit
from dalle1.training.schedules import cosine
from dvae import DVAE, Distortion, DVAEConfig, DVAELoss, dvae_loss


@dataclass(frozen=True, kw_only=True)
class DVAETrainConfig(CropTrainConfig):
    """Settings of a dVAE's training (paper §2.1, A.2)."""

    model: DVAEConfig = field(default_factory=DVAEConfig)
    """Architecture of the dVAE."""
    crops_per_image: int = 1
    """Number of crops per image. More than one saves time where reading is slow. Paper: 1."""
    distortion: Distortion = "logit-laplace"
    """Distance of a reconstruction from its image. Paper: logit-laplace."""
    beta: float = 6.6
    """Final weight β of the KL divergence."""
    beta_steps: int = 5_000
    """Updates during which β rises from 0 to its final value, along a cosine."""
    temperature: float = 1.0
    """Initial temperature τ of the Gumbel-softmax relaxation."""
    final_temperature: float = 1 / 16
    """Final temperature τ of the Gumbel-softmax relaxation."""
    temperature_steps: int = 150_000
    """Updates during which τ falls, along a cosine."""
    usage_weight: float = 0.0
    """Weight of a loss that keeps all codes in use early in training; without it, small budgets
    collapse to a few codes. Paper: 0."""
    mse_weight: float = 0.0
    """Final weight of the mean squared error, added to the distortion; it rises from 0 while τ
    falls, and moves reconstructions from the median to the mean. Paper: 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops_per_image < 1:
            raise ValueError(f"crops_per_image is {self.crops_per_image}, expected 1 or more")
        for name in ("temperature", "final_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")

    @property
    def decode_size(self) -> int:
        """Shorter side that suffices for the largest crop."""
        return math.ceil(self.crop_size * self.augmentation.resize[1])

    def temperature_at(self, step: int) -> float:
        """τ of the relaxation."""
        return cosine(
            step,
            start=self.temperature,
            end=self.final_temperature,
            duration=self.temperature_steps,
        )

    def mse_weight_at(self, step: int) -> float:
        """Weight of the mean squared error."""
        return cosine(step, start=0.0, end=self.mse_weight, duration=self.temperature_steps)

    def beta_at(self, step: int) -> float:
        """β, the weight of the KL."""
        return cosine(step, start=0.0, end=self.beta, duration=self.beta_steps)


# Paper: no gradient clipping is named. Here a loose limit, so that one bad batch of other data
# does not end a training.
_dvae_paper = DVAETrainConfig(
    out=Path("runs/dvae"),
    steps=3_000_000,
    batch_size=512,
    learning_rate=1e-4,
    final_learning_rate=1.25e-6,
    schedule_steps=1_200_000,
    warmup_steps=0,
)

# Small budgets: after 56 minutes of one CPU core, 25.90 dB on 1,000 scenes of Toybox, with all of
# 512 codes.
_dvae_small = replace(
    _dvae_paper,
    model=DVAEConfig(
        image_size=128,
        width=32,
        blocks_per_group=1,
        codebook_size=512,
        code_width=64,
        logit_gain=12.0,
        residual_gain=0.25,
        min_log_scale=-2.0,
    ),
    crop_size=64,
    augmentation=Augmentation(resize=(2.0, 2.0)),
    schedule_steps=None,
    steps=10_600,
    batch_size=32,
    learning_rate=3e-3,
    final_learning_rate=1e-4,
    beta2=0.98,
    warmup_steps=100,
    beta=0.1,
    beta_steps=1_000,
    temperature_steps=8_800,
    mse_weight=300.0,
    usage_weight=40.0,
    validation_images=1_000,
    validate_every=5_300,
)

# The same at the paper's geometry. Crops show the scenes at the scale of their rendering.
_dvae_toy = replace(
    _dvae_small,
    model=replace(_dvae_small.model, image_size=256),
    augmentation=Augmentation(resize=(4.0, 4.0)),
    steps=14_000,
    temperature_steps=11_600,
    validation_images=256,
    validate_every=3_500,
)

DVAE_PRESETS: dict[str, DVAETrainConfig] = {
    "toy": _dvae_toy,
    # Fine-tunes toy (--init), and drops codes that only the usage loss kept in use.
    "toy-finetune": replace(
        _dvae_toy,
        out=Path("runs/toy-finetune"),
        usage_weight=0.0,
        temperature=1 / 16,
        temperature_steps=1,
        beta_steps=1,
        learning_rate=1e-3,
        final_learning_rate=5e-5,
        steps=2_000,
        validate_every=500,
        save_every=500,
    ),
    "small": _dvae_small,
    "paper": _dvae_paper,
}


def crops(config: DVAETrainConfig, sample: Sample, rng: random.Random) -> Example:
    """Prepare one example: random crops of one image, [crops_per_image, 3, size, size]."""
    cut = [crop(config, sample, rng)["images"] for _ in range(config.crops_per_image)]
    return {"images": torch.stack(cut)}


@dataclass(frozen=True, kw_only=True)
class StepLoss(DVAELoss):
    """A step's loss and the values of its schedules, for the log."""

    temperature: float
    beta: float


class DVAETask(CropTask[DVAE, DVAETrainConfig]):
    """Trains a dVAE (stage 1)."""

    prepare = staticmethod(crops)

    def initial(self) -> DVAE:
        """Return a new dVAE, or load the one of --init."""
        config = self.config
        if config.init is None:
            return DVAE(config.model)
        model = DVAE.load(config.init)
        refuse_other_architecture("dVAE", config.init, model.config, config.model)
        return model

    def init_file(self, folder: Path) -> Path:
        return image_tokenizer_file(folder)

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[StepLoss]:
        config = self.config
        temperature, beta = config.temperature_at(step), config.beta_at(step)
        images = to_float(batch["images"].flatten(0, 1))
        stats, logits = self.model(images, temperature, rng)
        loss = dvae_loss(
            images,
            stats,
            logits,
            beta=beta,
            usage_weight=config.usage_weight,
            mse_weight=config.mse_weight_at(step),
            distortion=config.distortion,
        )
        return [StepLoss(**vars(loss), temperature=temperature, beta=beta)]

    def validate(self, model: DVAE) -> Iterator[tuple[str, float]]:
        likelihood = self.config.distortion == "logit-laplace"
        temperature = self.config.final_temperature
        with autocast(self.device, self.config.precision):
            metrics = reconstruction_metrics(model, self.held, temperature, likelihood=likelihood)
            numbers = list(metrics)
        yield from numbers

    def save(self, model: DVAE, folder: Path) -> None:
        model.save(folder)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(DVAE_PRESETS, args, __doc__.splitlines()[0])
        with graceful_run(config):
            fit(DVAETask(config), config)
        if distributed.is_main():
            print(f"The dVAE is in {config.out}")
