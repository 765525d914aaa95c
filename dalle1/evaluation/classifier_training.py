"""How the classifier is trained: on augmented renderings of all pairs.

Legend: B batch, H W pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm, trange

from dalle1.console import one_line_errors, parse
from dalle1.data.images import to_tensor
from dalle1.evaluation.classifier import (
    LAYOUTS,
    SLOTS,
    ClassifierConfig,
    ClassifierLogits,
    ToyboxClassifier,
    fills_are_visible,
    save_classifier,
    true_verdict,
)
from dalle1.evaluation.classifier_accuracy import (
    RENDER_SIZE,
    classifier_accuracy,
    print_accuracy,
)
from dalle1.files import write_atomic
from dalle1.toybox import Scene, render
from dalle1.toybox.kinds import scenes
from dalle1.training.interrupts import stop_on_signal

KEEP_EVERY = 200  # steps of a training
NONE = -1  # a question that a scene leaves open


@dataclass(frozen=True)
class Renderings:
    """Pictures, bytes [B, 3, H, W], with the index of the right answer to each question."""

    pictures: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.pictures)


def mixed_scenes(split: str, seed: str) -> Iterator[Scene]:
    """Yield all kinds of scenes, half of them relations, which are harder."""
    alone = (s for s in scenes(split, f"{seed} alone") if s.relation is None)
    related = (s for s in scenes(split, f"{seed} related") if s.relation is not None)
    for pair in zip(alone, related):
        yield from pair


def answers_of(scene: Scene, config: ClassifierConfig) -> list[int]:
    """Give the index of the right answer to each question, `NONE` where it is not asked.

    Of layout, style, the counts near and far; and of fill and noun in each slot.
    """
    right = true_verdict(scene)
    counts = [count - 1 for count in right.counts] or [NONE, NONE]
    found = [LAYOUTS.index(right.layout), config.styles.index(right.style), *counts]
    first = 0 if scene.relation is None else 1
    slots = [NONE] * (2 * SLOTS)
    for slot, (fill, noun) in enumerate(right.things, first):
        slots[2 * slot] = config.fills.index(fill) if fills_are_visible(scene) else NONE
        slots[2 * slot + 1] = config.nouns.index(noun)
    return found + slots


def render_many(config: ClassifierConfig, count: int, stream: Iterator[Scene]) -> Renderings:
    """Render `count` scenes into memory."""
    pictures = torch.empty(count, 3, RENDER_SIZE, RENDER_SIZE, dtype=torch.uint8)
    answers = []
    for i in tqdm(range(count), desc="rendering", unit="picture", leave=False):
        scene = next(stream)
        pictures[i] = to_tensor(render(scene, RENDER_SIZE))
        answers.append(answers_of(scene, config))
    return Renderings(pictures, torch.tensor(answers))


def degrade(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Shift, zoom, blur, tint and roughen `images` [B, 3, H, H] in [0, 1], each differently.

    Returns [B, 3, size, size]: what a discrete VAE with 8×8 patches does to a picture, somewhat
    exaggerated. Tints stay within 5 %, far less than lies between two colours of different names.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).mul_(high - low).add_(low)

    count, _, height, _ = images.shape
    sigma = uniform(-0.8, 2.0, count, 1, 1).clamp_(min=0.45)
    zoom = uniform(0.94, 1.06, count, 1, 1)
    turns = torch.arange(size)[:, None] / size * math.tau

    def axis() -> Tensor:  # a place to look at, and a slow wobble of up to two pixels along it
        wave = torch.sin(uniform(1, 3, count, 1, 1) * turns + uniform(0, math.tau, count, 1, 1))
        shift = uniform(-5, 5, count, 1, 1) + uniform(0, 2, count, 1, 1) * wave
        return _resampling(height, size, shift, zoom, sigma)

    down, across = axis(), axis()
    x = down[:, None] @ images @ across[:, None].mT  # [B, 3, size, size]
    block = size * 8 // 128  # one patch of the VAE
    # A third of the pictures keep all their detail; the coarsest blocks only ever shine through.
    kinds = torch.randint(3, (count,), generator=generator)
    share = uniform(-0.5, 1.0, count, 1, 1, 1).clamp_(min=0)
    for kind, (factor, most) in enumerate(((2, 1.0), (4, 0.6), (block, 0.35))):
        chosen = (kinds == kind).nonzero()[:, 0]
        if len(chosen):
            pooled = F.avg_pool2d(x[chosen], factor)
            mode = "nearest" if factor == block else "bilinear"
            coarse = F.interpolate(pooled, (size, size), mode=mode)
            x[chosen] = x[chosen].lerp_(coarse, share[chosen] * most)
    x = x.mul_(uniform(0.95, 1.05, count, 3, 1, 1)).add_(uniform(-0.03, 0.03, count, 1, 1, 1))
    noise = torch.randn(x.shape, generator=generator)
    return x.add_(noise.mul_(uniform(-0.03, 0.04, count, 1, 1, 1).clamp_(min=0))).clamp_(0, 1)


def _resampling(height: int, size: int, shift: Tensor, zoom: Tensor, sigma: Tensor) -> Tensor:
    """Return matrices [B, size, height] that shift, zoom and blur one axis, a Gaussian per row."""
    pixels = torch.arange(height, dtype=torch.float32)
    centre = (height - 1) / 2
    rows = (torch.arange(size) + 0.5) * height / size - 0.5  # where each lies in the original
    # Past the border the outermost pixel repeats.
    source = ((rows[:, None] - centre) * zoom + centre + shift).clamp(0, height - 1)
    weights = ((pixels - source) / sigma).square_().mul_(-0.5).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))


def loss_of(answers: ClassifierLogits, right: Tensor) -> Tensor:
    """Compute what the answers to all questions cost, each a mean of its own: nats."""
    counts = answers.counts.unbind(1)
    slots = zip(answers.fills.unbind(1), answers.nouns.unbind(1))
    asked = [answers.layout, answers.style, *counts, *(logits for pair in slots for logits in pair)]
    parts = [question(logits, each) for logits, each in zip(asked, right.unbind(1), strict=True)]
    return torch.stack(parts).sum()


def question(logits: Tensor, answers: Tensor) -> Tensor:
    """Compute what the answers to one question cost, a mean over those above -1: nats."""
    if not (answers >= 0).any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), answers, ignore_index=NONE, label_smoothing=0.02)


def train_classifier(
    config: ClassifierConfig,
    data: Renderings,
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    kept: Path | None = None,
) -> ToyboxClassifier:
    """Train a classifier; the same arguments on the same machine give the same weights.

    Where `kept` is given, the state of the training is kept there now and then, and where SIGINT or
    SIGTERM stops it (SystemExit): the same call goes on. ValueError if it is of another training.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = ToyboxClassifier(config).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
    parts: dict[str, Any] = {"classifier": classifier, "optimizer": optimizer, "schedule": schedule}
    settings = {**asdict(config), "steps": steps, "seed": seed, "batch_size": batch_size}
    settings["pictures"] = len(data)
    start = _restored(kept, settings, parts, generator)

    def keep(step: int) -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"settings": settings, "step": step, "generator": generator.get_state()}
        torch.save(state, content := io.BytesIO())
        assert kept is not None
        write_atomic(kept, content.getvalue())

    with stop_on_signal() as stopped:
        progress = trange(start, steps, desc="training the classifier", initial=start, unit="step")
        for step in progress:
            if kept and (stopped or (step > start and step % KEEP_EVERY == 0)):
                keep(step)
            if stopped:
                raise SystemExit(f"stopped at step {step} of {steps}; the same command goes on")
            chosen = torch.randint(len(data), (batch_size,), generator=generator)
            images = degrade(data.pictures[chosen].float() / 255, config.image_size, generator)
            loss = update(parts, images, data.answers[chosen])
            if step % 20 == 0:
                progress.set_postfix(loss=f"{loss:.3f}")
    if kept:
        kept.unlink(missing_ok=True)
    return classifier.eval()


def update(parts: Mapping[str, Any], images: Tensor, answers: Tensor) -> float:
    """Make one update on images [B, 3, h, w] in [0, 1] and their right answers; give the loss."""
    classifier, optimizer = parts["classifier"], parts["optimizer"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(classifier(images), answers)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(classifier.parameters(), 5.0)
    optimizer.step()
    parts["schedule"].step()
    return loss.item()


def _restored(
    kept: Path | None, settings: dict[str, Any], parts: dict[str, Any], generator: torch.Generator
) -> int:
    """Bring a training to where it was kept; give the step to go on with."""
    if kept is None or not kept.is_file():
        return 0
    state = torch.load(kept, weights_only=True)
    if state["settings"] != settings:
        raise ValueError(f"{kept} is of a training with other settings: remove it, or repeat those")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    return int(state["step"])


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """Train the Toybox classifier, and measure it on new renderings."""

    out: Path
    """File to write, a .safetensors."""
    steps: int = 5000
    """Updates of 64 images."""
    seed: int = 0
    """Random seed."""
    pictures: int = 40_000
    """Renderings in memory to train on: 49 kB each."""
    check_pictures: int = 1000
    """Other renderings, on which the classifier is measured."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("pictures", 1), ("check_pictures", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


def main(args: Sequence[str] | None = None) -> None:
    """Train a classifier, measure it and write it."""
    with one_line_errors():
        options = parse(ClassifierOptions, args, "Train the Toybox classifier.")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        config = ClassifierConfig()
        data = render_many(config, options.pictures, mixed_scenes("all", f"train {options.seed}"))
        kept = options.out.with_name(f".{options.out.name}.training")
        steps, seed = options.steps, options.seed
        classifier = train_classifier(config, data, steps=steps, seed=seed, kept=kept)
        save_classifier(classifier, options.out)
        print_accuracy(
            dict(classifier_accuracy(classifier, options.check_pictures, seed)),
            options.check_pictures,
        )


if __name__ == "__main__":
    main()
