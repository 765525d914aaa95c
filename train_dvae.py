"""Train a dVAE: pictures to a grid of codes and back (stage 1; paper §2.1, A).

    python train_dvae.py toy --data toybox --out runs/dvae

writes runs/dvae/latest/dvae.safetensors, a log and reconstructions; the same command goes on
after an interruption. Presets are in dalle1/presets.py.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dalle1.cli import clear_errors, parse_preset
from dalle1.data import PairSource, open_source
from dalle1.data.images import centre_square, grid, random_crop, to_float, to_pil, to_tensor
from dalle1.device import autocast, pick_device
from dalle1.presets import DVAE_PRESETS, DVAERecipe
from dalle1.training.loop import Batch, fit, step_generator, stream_from
from dalle1.training.schedules import cosine
from dvae import DVAE, DVAELoss, elbo_loss, evaluate


def cropped(
    size: int, crop_size: int, source: PairSource, index: int, rng: random.Random
) -> Mapping[str, Tensor]:
    """Prepare one example: a random crop of a picture."""
    picture = centre_square(source.image(index), size)
    return {"images": to_tensor(random_crop(picture, crop_size, rng))}


class DVAETraining:
    """What `fit` needs to know of stage 1."""

    def __init__(self, config: DVAERecipe) -> None:
        self.config, self.size = config, config.model.image_size
        self.device = pick_device(config.device)
        torch.manual_seed(config.seed)
        self.model = DVAE(config.model).to(self.device)
        source = open_source(config.data, "train", self.size, config.seed)
        prepare = partial(cropped, self.size, config.crop_size)
        self.stream = stream_from(source, prepare, config)
        held = open_source(config.data, "validation", self.size, config.seed)
        count = min(config.validation_pictures, len(held))
        pictures = [to_tensor(centre_square(held.image(i), self.size)) for i in range(count)]
        self.held = to_float(torch.stack(pictures)).to(self.device)

    def loss(self, model: DVAE, batch: Batch, step: int) -> DVAELoss:
        config = self.config
        temperature = cosine(
            step,
            start=config.temperature,
            end=config.final_temperature,
            duration=config.temperature_steps,
        )
        beta = cosine(step, start=0.0, end=config.beta, duration=config.beta_steps)
        images = to_float(batch["images"])
        stats, logits = model(images, temperature, step_generator(config.seed, step, self.device))
        return elbo_loss(images, stats, logits, beta=beta, usage_weight=config.usage_weight)

    def validate(self, model: DVAE, step: int) -> Mapping[str, float]:
        shown = self.held[:16]
        with autocast(self.device, self.config.precision):
            pictures = to_pil(torch.cat([shown, model.decode(model.encode(shown))]))
            numbers = evaluate(model, self.held, self.config.final_temperature)
        folder = self.config.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid(pictures, len(shown)).save(folder / f"step-{step}.png")
        return numbers

    def save(self, model: DVAE, folder: Path) -> None:
        model.save(folder)


def main(args: Sequence[str] | None = None) -> None:
    with clear_errors():
        config = parse_preset(DVAE_PRESETS, args, __doc__.splitlines()[0])
        run = DVAETraining(config)
        fit(run.model, run.loss, run.stream, config, save_model=run.save, validate=run.validate)
        print(f"The dVAE is in {config.out}")


if __name__ == "__main__":
    main()
