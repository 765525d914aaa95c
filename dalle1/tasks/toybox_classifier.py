"""Train the classifier that checks samples in the Toybox evaluation.

    dalle1 train classifier toy --out runs/classifier

Training images are renderings of all pairs, augmented to look like the reconstructions of a dVAE.
Writes runs/classifier/latest/classifier.safetensors and a log. After an interruption, the same
command resumes.

Legend: B batch, H W pixels, Q predictions: layout, style, two counts, fill and noun of each slot.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dalle1.console import one_line_errors, parse_preset
from dalle1.data.images import to_float, to_tensor
from dalle1.data.loader import Batch
from dalle1.evaluation.classifier import (
    FILE_NAME,
    LAYOUTS,
    SLOTS,
    ClassifierConfig,
    ClassifierLogits,
    ToyboxClassifier,
    fills_are_visible,
    save_classifier,
    true_verdict,
)
from dalle1.evaluation.classifier_accuracy import RENDER_SIZE, accuracy
from dalle1.toybox import Scene, render, sample_scene
from dalle1.toybox.kinds import scenes
from dalle1.training import distributed
from dalle1.training.config import TrainConfig, resolve_precision
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit
from dalle1.training.task import Task

NOT_ASKED = -1  # target of a prediction that does not apply to a scene
NUM_PREDICTIONS = 4 + 2 * SLOTS  # Q
LABEL_SMOOTHING = 0.02
PATCH = 8  # side of a dVAE's patches in pixels, at a width of 128


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainConfig(TrainConfig):
    """Settings of the Toybox classifier's training."""

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Architecture and classes."""
    num_scenes: int = 40_000
    """Number of distinct scenes to train on; each rendering takes 49 kB of memory."""
    validation_images: int = 500
    """Renderings on which accuracy is measured, clean and augmented."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data != "toybox":
            raise ValueError(f"data is {self.data!r}, expected toybox; see --num-scenes")
        for name in ("num_scenes", "validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


CLASSIFIER_PRESETS = {
    "toy": ClassifierTrainConfig(
        out=Path("runs/classifier"),
        steps=5_000,
        batch_size=64,
        learning_rate=3e-3,
        warmup_steps=1_500,
        weight_decay=0.05,
        decays="all",
        clip_norm=5.0,
        ema_decay=0.0,
        validate_every=1_000,
        save_every=200,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ClassifierLoss:
    """Cross-entropies in nats, each averaged over the images to which it applies."""

    total: Tensor  # [] sum of the others
    layout: Tensor
    style: Tensor
    counts: Tensor  # near and far
    fills: Tensor  # of all slots
    nouns: Tensor


def scene_at(index: int, seed: int) -> Scene:
    """Return training scene `index`: odd ones have a relation, as these are harder."""
    rng = random.Random(f"classifier/{seed}/{index}")
    while True:
        scene = sample_scene(rng, "all")
        if (scene.relation is not None) == bool(index % 2):
            return scene


def targets(scene: Scene, config: ClassifierConfig) -> list[int]:
    """Return the class of each prediction [Q], or `NOT_ASKED`."""
    verdict = true_verdict(scene)
    counts = [count - 1 for count in verdict.counts] or [NOT_ASKED, NOT_ASKED]
    slots = [NOT_ASKED] * (2 * SLOTS)
    first = 0 if scene.relation is None else 1
    for slot, (fill, noun) in enumerate(verdict.things, first):
        slots[2 * slot] = config.fills.index(fill) if fills_are_visible(scene) else NOT_ASKED
        slots[2 * slot + 1] = config.nouns.index(noun)
    return [LAYOUTS.index(verdict.layout), config.styles.index(verdict.style), *counts, *slots]


class SceneLoader:
    """Batches of the training scenes, which are rendered into memory once.

    The batch of a step follows from the seed and the step alone. num_workers is not used.
    """

    def __init__(self, config: ClassifierTrainConfig) -> None:
        self.config = config
        self.images = torch.empty(config.num_scenes, 3, RENDER_SIZE, RENDER_SIZE, dtype=torch.uint8)
        self.targets = torch.empty(config.num_scenes, NUM_PREDICTIONS, dtype=torch.int64)
        for index in tqdm(range(config.num_scenes), "rendering", unit="image", leave=False):
            scene = scene_at(index, config.seed)
            self.images[index] = to_tensor(render(scene, RENDER_SIZE))
            self.targets[index] = torch.tensor(targets(scene, config.model))

    def batches(self, start: int) -> Generator[Batch]:
        """Yield this process's part of each batch, from step `start` on."""
        config = self.config
        for step in count(start):
            rng = random.Random(f"classifier batch {config.seed}/{step}")
            chosen = rng.choices(range(config.num_scenes), k=config.batch_size)
            part = chosen[distributed.rank() :: distributed.world_size()]
            yield Batch(tensors={"images": self.images[part], "targets": self.targets[part]})

    def state_dict(self) -> None:
        """Return None: the step alone determines a batch."""

    def load_state_dict(self, state: Any) -> None:
        """Do nothing: there is no state."""


def augment(images: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Shift, zoom, blur, tint and coarsen `images` [B, 3, H, H] in [0, 1], each differently.

    Returns [B, 3, size, size]: a slight exaggeration of what a dVAE with 8×8 patches does to an
    image. Tints stay within 5 %, far less than the difference of two named colours.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=rng, device=rng.device).mul_(high - low).add_(low)

    batch, _, height, _ = images.shape
    sigma = uniform(-0.8, 2.0, batch, 1, 1).clamp_(min=0.45)
    zoom = uniform(0.94, 1.06, batch, 1, 1)
    phase = torch.arange(size, device=rng.device)[:, None] / size * math.tau

    def axis() -> Tensor:  # a shift, and a slow wobble of up to two pixels along the axis
        wave = torch.sin(uniform(1, 3, batch, 1, 1) * phase + uniform(0, math.tau, batch, 1, 1))
        shift = uniform(-5, 5, batch, 1, 1) + uniform(0, 2, batch, 1, 1) * wave
        return _resampling(height, size, shift, zoom, sigma)

    down, across = axis(), axis()
    x = down[:, None] @ images @ across[:, None].mT  # [B, 3, size, size]
    block = size * PATCH // 128
    # A third of the images keep all their detail; the coarsest blocks are only mixed in.
    kinds = torch.randint(3, (batch,), generator=rng, device=rng.device)
    share = uniform(-0.5, 1.0, batch, 1, 1, 1).clamp_(min=0)
    for kind, (factor, limit) in enumerate(((2, 1.0), (4, 0.6), (block, 0.35))):
        chosen = (kinds == kind).nonzero()[:, 0]
        if len(chosen):
            pooled = F.avg_pool2d(x[chosen], factor)
            mode = "nearest" if factor == block else "bilinear"
            coarse = F.interpolate(pooled, (size, size), mode=mode)
            x[chosen] = x[chosen].lerp_(coarse, share[chosen] * limit)
    x = x.mul_(uniform(0.95, 1.05, batch, 3, 1, 1)).add_(uniform(-0.03, 0.03, batch, 1, 1, 1))
    noise = torch.randn(x.shape, generator=rng, device=rng.device)
    return x.add_(noise.mul_(uniform(-0.03, 0.04, batch, 1, 1, 1).clamp_(min=0))).clamp_(0, 1)


def _resampling(height: int, size: int, shift: Tensor, zoom: Tensor, sigma: Tensor) -> Tensor:
    """Return matrices [B, size, height] that shift, zoom and blur one axis, a Gaussian per row."""
    pixels = torch.arange(height, dtype=torch.float32, device=shift.device)
    centre = (height - 1) / 2
    rows = (torch.arange(size, device=shift.device) + 0.5) * height / size - 0.5
    # Beyond the border the outermost pixel repeats.
    source = ((rows[:, None] - centre) * zoom + centre + shift).clamp(0, height - 1)
    weights = ((pixels - source) / sigma).square_().mul_(-0.5).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))


def classifier_loss(logits: ClassifierLogits, targets: Tensor) -> ClassifierLoss:
    """Compute the loss of all predictions; `targets` [B, Q]."""
    layout, style, near, far, *slots = targets.unbind(1)
    parts = {
        "layout": _cross_entropy([logits.layout], [layout]),
        "style": _cross_entropy([logits.style], [style]),
        "counts": _cross_entropy(logits.counts.unbind(1), (near, far)),
        "fills": _cross_entropy(logits.fills.unbind(1), slots[0::2]),
        "nouns": _cross_entropy(logits.nouns.unbind(1), slots[1::2]),
    }
    return ClassifierLoss(total=torch.stack(list(parts.values())).sum(), **parts)


def _cross_entropy(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Sum over predictions the cross-entropy, averaged over the images that have a target."""
    total = logits[0].new_zeros((), dtype=torch.float32)
    for x, y in zip(logits, targets, strict=True):
        if (y != NOT_ASKED).any():
            total = total + F.cross_entropy(
                x.float(), y, ignore_index=NOT_ASKED, label_smoothing=LABEL_SMOOTHING
            )
        else:
            total = total + 0.0 * x.float().sum()  # every parameter has a gradient
    return total


class ClassifierTask(Task[ToyboxClassifier]):
    """Trains the Toybox classifier."""

    def __init__(self, config: ClassifierTrainConfig) -> None:
        self.device = distributed.init(config.device)
        self.config = config = resolve_precision(config, self.device)
        torch.manual_seed(config.seed)
        self.model = ToyboxClassifier(config.model).train().to(self.device)
        self.loader = SceneLoader(config)

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[ClassifierLoss]:
        with torch.autocast(rng.device.type, enabled=False):  # images are fp32
            images = augment(to_float(batch["images"]), self.config.model.image_size, rng)
        return [classifier_loss(self.model(images), batch["targets"])]

    def validate(self, model: ToyboxClassifier) -> Iterator[tuple[str, float]]:
        """Yield the accuracy of each aspect on new renderings, and on augmented ones."""
        num_images, seed = self.config.validation_images, f"validation {self.config.seed}"
        yield from accuracy(model, scenes("all", seed), num_images)
        rng = torch.Generator().manual_seed(self.config.seed)
        augmented = partial(augment, size=self.config.model.image_size, rng=rng)
        for aspect, share in accuracy(model, scenes("all", seed), num_images, augment=augmented):
            yield f"augmented_{aspect}", share

    def save(self, model: ToyboxClassifier, folder: Path) -> None:
        save_classifier(model, folder / FILE_NAME)


def main(args: Sequence[str] | None = None) -> None:
    """Run `dalle1 train classifier`."""
    with one_line_errors():
        config = parse_preset(CLASSIFIER_PRESETS, args, (__doc__ or "").splitlines()[0])
        train(config)
        if distributed.is_main():
            print(f"The classifier is in {config.out}")


def train(config: ClassifierTrainConfig) -> ToyboxClassifier:
    """Train a classifier, or resume the training in `config.out`; return it."""
    with graceful_run(config):
        return fit(ClassifierTask(config), config)
