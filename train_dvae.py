"""Train a dVAE: pictures to a grid of codes and back (stage 1; paper §2.1, A).

    python train_dvae.py toy --data toybox --out runs/dvae

writes runs/dvae/latest/dvae.safetensors, a log and reconstructions; the same command goes on
after an interruption. Presets are in dalle1/tasks/presets.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from dalle1.console import one_line_errors, parse_preset
from dalle1.data import PairSource, open_source
from dalle1.data.images import augmented, centre_square, grid, to_float, to_pil, to_tensor
from dalle1.data.loader import Example, first_examples
from dalle1.devices import autocast
from dalle1.evaluation.reconstruction import reconstruction_metrics
from dalle1.tasks.presets import DVAE_PRESETS, DVAETrainConfig
from dalle1.training import distributed
from dalle1.training.interrupts import training
from dalle1.training.loop import fit, stream_from
from dalle1.training.trainer import Batch
from dvae import DVAE, DVAELoss, dvae_loss


def crops(config: DVAETrainConfig, source: PairSource, index: int, rng: random.Random) -> Example:
    """Prepare one example: random crops of one picture, [crops_per_picture, 3, size, size]."""
    picture, size = source.image(index), config.crop_size
    cut = [
        augmented(picture, size, rng, config.augmentation, config.allow_upscale)
        for _ in range(config.crops_per_picture)
    ]
    return {"images": torch.stack([to_tensor(crop) for crop in cut])}


def centred(config: DVAETrainConfig, source: PairSource, index: int, _: random.Random) -> Example:
    """Prepare one example to validate on: the centre of a picture, [3, size, size]."""
    size = config.model.image_size
    return {"images": to_tensor(centre_square(source.image(index), size, config.allow_upscale))}


@dataclass(frozen=True, kw_only=True)
class StepLoss(DVAELoss):
    """A step's loss with the schedules that it was made under, for the log."""

    temperature: float
    beta: float


class DVAETraining:
    """What `fit` needs to know of stage 1."""

    def __init__(self, config: DVAETrainConfig) -> None:
        self.config = config
        self.device = distributed.start(config.device)
        torch.manual_seed(config.seed)
        self.model = self.initial().to(self.device)
        size = config.model.image_size
        place = config.data, "train", size, config.seed, False
        detail = math.ceil(config.crop_size * config.augmentation.resize[1])
        source = open_source(*place, reading=config, detail=detail)
        self.stream = stream_from(source, partial(crops, config), config)
        place = config.data, "validation", size, config.seed, False
        held = open_source(*place, reading=config, detail=size)
        whole = partial(centred, config)
        first = partial(first_examples, held, whole, config.validation_pictures)
        self.held = to_float(distributed.broadcast_from_main(first)["images"]).to(self.device)

    def initial(self) -> DVAE:
        """Make a new dVAE, or take the one that --init names."""
        config = self.config
        if config.init is None:
            return DVAE(config.model)
        model = DVAE.load(config.init)
        given, wanted = asdict(model.config), asdict(config.model)
        if given != wanted:
            changed = (k for k in given if given[k] != wanted[k])
            flags = " ".join(f"--model.{k.replace('_', '-')} {given[k]}" for k in changed)
            raise ValueError(f"the dVAE in {config.init} is of another size; add {flags}")
        return model.train()

    def loss(self, model: DVAE, batch: Batch, step: int, generator: torch.Generator) -> StepLoss:
        config = self.config
        temperature, beta = config.temperature_at(step), config.beta_at(step)
        images = to_float(batch["images"].flatten(0, 1))
        stats, logits = model(images, temperature, generator)
        loss = dvae_loss(
            images,
            stats,
            logits,
            beta=beta,
            usage_weight=config.usage_weight,
            mse_weight=config.mse_weight_at(step),
            distortion=config.distortion,
        )
        return StepLoss(**vars(loss), temperature=temperature, beta=beta)

    def validate(self, model: DVAE, step: int) -> Mapping[str, float]:
        shown = self.held[:16]
        with autocast(self.device, self.config.precision):
            pictures = to_pil(torch.cat([shown, model.decode(model.encode(shown))]))
            likelihood = self.config.distortion == "logit-laplace"
            temperature = self.config.final_temperature
            metrics = reconstruction_metrics(model, self.held, temperature, likelihood=likelihood)
            numbers = dict(metrics)
        if distributed.is_main():
            folder = self.config.out / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            grid(pictures, len(shown)).save(folder / f"step-{step}.png")
        return numbers

    def save(self, model: DVAE, folder: Path) -> None:
        model.save(folder)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(DVAE_PRESETS, args, __doc__.splitlines()[0])
        with training(config):
            run = DVAETraining(config)
            fit(run.model, run.loss, run.stream, config, save_model=run.save, validate=run.validate)
        if distributed.is_main():
            print(f"The dVAE is in {config.out}")


if __name__ == "__main__":
    main()
