"""Train the upsampler of DALL·E 2, which doubles the sides of sampled images (§2.1).

    dalle1 train upsampler small --data toybox --out runs/upsampler

writes runs/upsampler/latest/upsampler.safetensors, a log and samples. The same command resumes
after an interruption. It needs neither captions nor any other model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dalle1.console import one_line_errors, parse_preset
from dalle1.data.crops import Augmentation
from dalle1.data.images import grid, save_png, to_float, to_pil
from dalle1.devices import autocast
from dalle1.tasks.crops import CropTask, CropTrainConfig, refuse_other_architecture
from dalle1.training import distributed
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit
from dalle2.autoencoder import Autoencoder, load_autoencoder
from dalle2.bundled import name_folders
from dalle2.diffusion.objective import Errors, prediction_errors, sample_times
from dalle2.diffusion.schedule import Schedule
from dalle2.tasks.diffusion import DiffusionLoss, binned, diffusion_loss, kept, validation_times
from dalle2.upsampler import Upsampler, UpsamplerConfig, blurred, reduced
from dvae.losses import psnr
from dvae.model import DOWNSAMPLING

SHOWN = 8
"""Number of validation images that are upsampled at each validation."""


@dataclass(frozen=True, kw_only=True)
class UpsamplerTrainConfig(CropTrainConfig):
    """Settings of an upsampler's training (§2.1, App. C)."""

    model: UpsamplerConfig = field(default_factory=UpsamplerConfig)
    """Architecture of the upsampler."""
    crop_size: int = 64
    """Side of the random training crops in upsampled pixels. Paper: a quarter of the image."""
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(resize=(4.0, 4.0)))
    """Random crops of the training images."""
    blur_share: float = 0.5
    """Share of the small images that are blurred, so that their details are not trusted."""
    autoencoder: Path | None = None
    """Folder of the decoder's autoencoder, or "unclip": the small images are what it restores, as
    those that are upsampled are. None, as in the paper: they are the images, reduced."""

    @property
    def crop_multiple(self) -> int:
        levels = 1 << (len(self.model.multipliers) - 1)
        latents = DOWNSAMPLING * self.model.factor if self.autoencoder else 1
        return math.lcm(self.model.factor, levels, latents)

    @property
    def decode_size(self) -> int:
        """Shorter side that suffices for the largest crop."""
        return math.ceil(self.crop_size * self.augmentation.resize[1])

    def __post_init__(self) -> None:
        name_folders(self, "autoencoder", "init")
        super().__post_init__()
        side, multiple = self.model.image_size, DOWNSAMPLING * self.model.factor
        if self.autoencoder is not None and side % multiple:
            raise ValueError(
                f"model.image_size is {side}, expected a multiple of {multiple}, since the "
                f"autoencoder restores images of multiples of {DOWNSAMPLING} pixels"
            )
        if not 0 <= self.blur_share <= 1:
            raise ValueError(f"blur_share is {self.blur_share}, expected a number in [0, 1]")


_small = UpsamplerTrainConfig(
    out=Path("runs/upsampler"),
    model=UpsamplerConfig(group_width=8),
    steps=2_000,
    batch_size=16,
    optimizer="muon",
    learning_rate=2e-3,
    final_learning_rate=1e-5,
    warmup_steps=50,
    beta2=0.99,
    clip_norm=1.0,
)

# The paper's first upsampler, 64 → 256, table 3.
_paper = replace(
    _small,
    model=UpsamplerConfig(
        width=320,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        dropout=0.1,
        objective="epsilon",
        factor=4,
    ),
    optimizer="adamw",
    steps=1_000_000,
    batch_size=1024,
    learning_rate=1.2e-4,
    warmup_steps=5_000,
    beta2=0.999,
    ema_decay=0.9999,
)

UPSAMPLER_PRESETS: dict[str, UpsamplerTrainConfig] = {"small": _small, "paper": _paper}


class UpsamplerTask(CropTask[Upsampler, UpsamplerTrainConfig]):
    """Trains an upsampler."""

    def __init__(self, config: UpsamplerTrainConfig) -> None:
        super().__init__(config)
        self.schedule = Schedule(config.model.schedule, config.model.times)
        self.autoencoder = None
        if config.autoencoder is not None:
            self.autoencoder = load_autoencoder(config.autoencoder, self.device)

    def files(self) -> Mapping[str, Path]:
        folder = self.config.autoencoder
        return {} if folder is None else {"autoencoder": Autoencoder.file_in(folder)}

    def reduced(self, images: Tensor) -> Tensor:
        """Return the small images of images [B, 3, H, W], as the upsampler is given them."""
        small = reduced(images, self.config.model.factor)
        if self.autoencoder is None:
            return small
        return self.autoencoder.decode(self.autoencoder.encode(small)).to(small)

    def initial(self) -> Upsampler:
        """Return a new upsampler, or load the one of --init."""
        config = self.config
        if config.init is None:
            return Upsampler(config.model)
        model = Upsampler.load(config.init)
        refuse_other_architecture("upsampler", config.init, model.config, config.model)
        return model

    def init_file(self, folder: Path) -> Path:
        return Upsampler.file_in(folder)

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[DiffusionLoss]:
        images = to_float(batch["images"])
        t = sample_times(len(images), self.schedule, rng)
        sharp = kept(len(images), self.config.blur_share, rng)
        return [diffusion_loss(self.errors(self.model, images, t, rng, sharp))]

    def errors(
        self, model: Upsampler, images: Tensor, t: Tensor, rng: torch.Generator, sharp: Tensor
    ) -> Errors:
        """Return the errors of each image's prediction at times t [B].

        Args:
            sharp: bool [B]; the small images of others are blurred.
        """
        small = self.reduced(images)
        small = torch.where(sharp[:, None, None, None], small, blurred(small))
        arch = model.config
        return prediction_errors(
            lambda x, t: model(x, t, small),
            arch.objective,
            self.schedule,
            2 * images - 1,
            t,
            rng,
            arch.learns_variance,
        )

    @torch.no_grad()
    def validate(self, model: Upsampler) -> Iterator[tuple[str, float]]:
        """Yield the loss on the centres of validation images, and the PSNR of upsampled ones.

        `enlarged_psnr` is that of the small images, enlarged bilinearly.
        """
        edge = (self.held.shape[-1] - self.config.crop_size) // 2
        inner = slice(edge, edge + self.config.crop_size)
        crops = self.held[:, :, inner, inner]
        t = validation_times(len(crops), self.schedule, self.device)
        rng, sharp = torch.Generator(self.device).manual_seed(0), torch.ones_like(t).bool()
        with autocast(self.device, self.config.precision):
            errors = self.errors(model, crops, t, rng, sharp)
        yield from binned(errors.total)
        images, enlarged, upsampled = self.upsampled(model)
        yield "psnr", float(psnr(images, upsampled).mean())
        yield "enlarged_psnr", float(psnr(images, enlarged).mean())

    def upsampled(self, model: Upsampler) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first validation images, and their small ones, enlarged and upsampled."""
        images = self.held[:SHOWN]
        small = self.reduced(images)
        with autocast(self.device, self.config.precision):
            upsampled = model.upsample(small, range(len(small)))
        return images, model.enlarged(small), upsampled.float()

    def sample(self, model: Upsampler, path: Path) -> None:
        """Write eight small images, enlarged; below them, upsampled; and the images themselves."""
        images, enlarged, upsampled = self.upsampled(model)
        save_png(grid(to_pil(torch.cat([enlarged, upsampled, images])), len(images)), path)

    def save(self, model: Upsampler, folder: Path) -> None:
        model.save(folder)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(UPSAMPLER_PRESETS, args, __doc__.splitlines()[0])
        with graceful_run(config):
            fit(UpsamplerTask(config), config)
        if distributed.is_main():
            print(f"The upsampler is in {config.out}")
