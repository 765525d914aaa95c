"""Train the classifier that evaluate.py checks samples with: which concept, by which artist?

    python recipes/emoji/classifier.py train --data runs/emoji
    python recipes/emoji/classifier.py heldout --data runs/emoji

`train` learns from all pairs, since it has to recognize held-out ones. `heldout` learns from
training pairs only: its accuracy on the real images of held-out pairs states how well this network
recognizes artwork that it never saw. The same command resumes after an interruption.

Legend: B batch, N images, C channels, H W pixels.
"""

from __future__ import annotations

import io
import json
import math
import random
import tarfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle1.clip.resnet import ModifiedResNet
from dalle1.console import one_line_errors, parse_preset
from dalle1.data.images import to_float, to_tensor
from dalle1.data.loader import Batch
from dalle1.storage import load_weights, model_folder, save_weights
from dalle1.tasks.toybox_classifier import augment
from dalle1.training import distributed
from dalle1.training.config import TrainConfig, resolve_precision
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit
from dalle1.training.task import Task

FILE_NAME = "classifier.safetensors"
PIXELS = 128  # side of the images in memory
ROTATION, ZOOM, SHIFT = 12, (0.9, 1.25), 0.08  # augmentation: degrees, factors, share of the side
LABEL_SMOOTHING = 0.05


@dataclass(frozen=True)
class Emoji:
    """All real images of a recipe's folder, by training and held-out pairs."""

    images: Tensor  # [N, 3, PIXELS, PIXELS], uint8
    concepts: list[str]
    artists: list[str]
    held_out: list[bool]

    @classmethod
    def read(cls, folder: Path) -> Emoji:
        """Read the shards that emoji.py wrote to `folder`."""
        images, facts = [], []
        for part in ("train", "heldout"):
            for shard in sorted((folder / part).glob("*.tar")):
                with tarfile.open(shard) as tar:
                    files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
                for name in (name for name in files if name.endswith(".json")):
                    pair = json.loads(files[name])
                    if pair["held_out"] == (part == "heldout"):  # OUT/train repeats some of them
                        image = Image.open(io.BytesIO(files[name.replace(".json", ".png")]))
                        images.append(to_tensor(image.convert("RGB").reduce(image.width // PIXELS)))
                        facts.append(pair)
        if not images:
            raise ValueError(f"no shards in {folder}; write them with recipes/emoji/emoji.sh")
        columns = ([pair[key] for pair in facts] for key in ("concept", "artist", "held_out"))
        return cls(torch.stack(images), *columns)

    def where(self, held_out: bool) -> list[int]:
        """Return the indices of the held-out pairs, or of all others."""
        return [i for i, value in enumerate(self.held_out) if value == held_out]


@dataclass(frozen=True)
class EmojiClassifierConfig:
    """Classes and size of the classifier."""

    concepts: tuple[str, ...] = ()
    artists: tuple[str, ...] = ()
    image_size: int = 96
    width: int = 24
    embed_dim: int = 256

    def __post_init__(self) -> None:
        for name in ("concepts", "artists"):  # a file's metadata has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))


class EmojiClassifier(nn.Module):
    """CLIP's modified ResNet with two heads: concept and artist."""

    def __init__(self, config: EmojiClassifierConfig) -> None:
        super().__init__()
        self.config, size = config, config.image_size
        self.trunk = ModifiedResNet(
            (1, 1, 1, 1), image_size=size, width=config.width, heads=8, embed_dim=config.embed_dim
        )
        self.concept = nn.Linear(config.embed_dim, len(config.concepts))
        self.artist = nn.Linear(config.embed_dim, len(config.artists))

    def stages(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps of all stages for images [B, 3, H, W] in [0, 1]."""
        size = (self.config.image_size, self.config.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        trunk, maps = self.trunk, []
        x = (2 * images - 1).to(memory_format=torch.channels_last)
        for i in (1, 2, 3):
            x = F.relu(getattr(trunk, f"bn{i}")(getattr(trunk, f"conv{i}")(x)))
        x = trunk.avgpool(x)
        for i in (1, 2, 3, 4):
            x = getattr(trunk, f"layer{i}")(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of concepts and of artists."""
        x = self.trunk.attnpool(self.stages(images)[-1])
        return self.concept(x), self.artist(x)

    @torch.inference_mode()
    def classify(self, images: Tensor, batch_size: int = 64) -> list[tuple[str, str]]:
        """Return (concept, artist) of images [N, 3, H, W], uint8."""
        config, found, device = self.config, [], self.concept.weight.device
        for batch in images.split(batch_size):
            rows = zip(*(x.argmax(1).tolist() for x in self(to_float(batch.to(device)))))
            found += [(config.concepts[c], config.artists[a]) for c, a in rows]
        return found

    @torch.inference_mode()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute the perceptual distance of image pairs [B, 3, H, W], uint8: [B].

        As LPIPS (Zhang et al. 2018) without its learned weights: squared differences of feature
        maps with channels of unit length, averaged over positions and stages.
        """
        total = torch.zeros(len(a))
        maps = zip(self.stages(to_float(a)), self.stages(to_float(b)), strict=True)
        for x, y in maps:
            difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
            total += difference.square().sum(1).mean((1, 2)) / 4
        return total


def load_classifier(folder: Path) -> EmojiClassifier:
    """Load a classifier from its training's folder, in evaluation mode."""
    return load_weights(
        EmojiClassifier, EmojiClassifierConfig, model_folder(folder) / FILE_NAME, "cpu"
    )


@dataclass(frozen=True, kw_only=True)
class EmojiClassifierTrainConfig(TrainConfig):
    """Settings of the classifier's training."""

    held_out: bool = True
    """Whether held-out pairs are trained on, too."""
    width: int = 24
    """Channels of the first stage."""


PRESETS = {
    "train": EmojiClassifierTrainConfig(
        out=Path("runs/emoji-model/classifier"),
        data="runs/emoji",
        steps=4_000,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=200,
        weight_decay=0.05,
        ema_decay=0.99,
        validate_every=1_000,
        save_every=200,
    )
}
PRESETS["heldout"] = replace(
    PRESETS["train"], out=Path("runs/emoji-model/classifier-heldout"), held_out=False
)


@dataclass(frozen=True, kw_only=True)
class ClassifierLoss:
    """Cross-entropies in nats."""

    total: Tensor  # [] sum of the others
    concept: Tensor
    artist: Tensor


class EmojiLoader:
    """Batches of the images in memory. The batch of a step follows from seed and step alone."""

    def __init__(
        self, config: TrainConfig, images: Tensor, targets: Tensor, use: Sequence[int]
    ) -> None:
        self.config, self.images, self.targets, self.use = config, images, targets, use

    def batches(self, start: int) -> Generator[Batch]:
        """Yield this process's part of each batch, from step `start` on."""
        config = self.config
        for step in count(start):
            rng = random.Random(f"emoji batch {config.seed}/{step}")
            chosen = rng.choices(self.use, k=config.batch_size)
            part = chosen[distributed.rank() :: distributed.world_size()]
            yield Batch(tensors={"images": self.images[part], "targets": self.targets[part]})

    def state_dict(self) -> None:
        """Return None: the step alone determines a batch."""

    def load_state_dict(self, state: Any) -> None:
        """Do nothing: there is no state."""


def augmented(images: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Rotate, zoom and shift `images` [B, 3, H, W] in [0, 1], then blur and coarsen them.

    Returns: [B, 3, size, size].
    """
    angle, x, y = torch.empty(3, len(images), device=rng.device).uniform_(-1.0, 1.0, generator=rng)
    scale = torch.empty(len(images), device=rng.device).uniform_(*ZOOM, generator=rng)
    angle, x, y = angle * math.radians(ROTATION), x * 2 * SHIFT, y * 2 * SHIFT
    sine, cosine = angle.sin() * scale, angle.cos() * scale
    rows = torch.stack([torch.stack([cosine, -sine, x], 1), torch.stack([sine, cosine, y], 1)], 1)
    field = F.affine_grid(rows, list(images.shape), align_corners=False)
    # Around the image there is white.
    moved = 1 - F.grid_sample(1 - images, field, align_corners=False)
    return augment(moved, size, rng)


class EmojiClassifierTask(Task[EmojiClassifier]):
    """Trains the classifier."""

    def __init__(self, config: EmojiClassifierTrainConfig) -> None:
        self.device = distributed.init(config.device)
        self.config = config = resolve_precision(config, self.device)
        self.emoji = emoji = Emoji.read(Path(config.data))
        concepts, artists = sorted(set(emoji.concepts)), sorted(set(emoji.artists))
        classes = EmojiClassifierConfig(tuple(concepts), tuple(artists), width=config.width)
        torch.manual_seed(config.seed)
        self.model = EmojiClassifier(classes).train().to(self.device)
        order = [{name: i for i, name in enumerate(names)} for names in (concepts, artists)]
        pairs = zip(emoji.concepts, emoji.artists)
        targets = torch.tensor([[order[0][c], order[1][a]] for c, a in pairs])
        use = emoji.where(False) + (emoji.where(True) if config.held_out else [])
        self.loader = EmojiLoader(config, emoji.images, targets, use)

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[ClassifierLoss]:
        with torch.autocast(rng.device.type, enabled=False):  # images are fp32
            images = augmented(to_float(batch["images"]), self.model.config.image_size, rng)
        concept, artist = (
            F.cross_entropy(logits.float(), target, label_smoothing=LABEL_SMOOTHING)
            for logits, target in zip(self.model(images), batch["targets"].unbind(1))
        )
        return [ClassifierLoss(total=concept + artist, concept=concept, artist=artist)]

    def validate(self, model: EmojiClassifier) -> Iterator[tuple[str, float]]:
        """Yield the accuracy on the real held-out images, and on as many of training pairs."""
        emoji = self.emoji
        for name, held_out in (("heldout", True), ("train", False)):
            chosen = emoji.where(held_out)[: len(emoji.where(True))]
            yield from accuracy(model, emoji, emoji.images[chosen], chosen, name)
            rng = torch.Generator().manual_seed(self.config.seed)
            moved = augmented(to_float(emoji.images[chosen]), model.config.image_size, rng)
            pixels = (moved * 255).round().byte()
            yield from accuracy(model, emoji, pixels, chosen, f"augmented_{name}")

    def save(self, model: EmojiClassifier, folder: Path) -> None:
        save_weights(model, folder / FILE_NAME, torch.float16)


def accuracy(
    model: EmojiClassifier, emoji: Emoji, images: Tensor, chosen: Sequence[int], name: str
) -> Iterator[tuple[str, float]]:
    """Yield the shares of right concepts, artists and both of images of the pairs `chosen`."""
    found = model.classify(images)
    right = [(c == emoji.concepts[i], a == emoji.artists[i]) for i, (c, a) in zip(chosen, found)]
    for part, value in zip(("concept", "artist"), zip(*right)):
        yield f"{name}_{part}", sum(value) / len(value)
    yield f"{name}_both", sum(map(all, right)) / len(right)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(PRESETS, args, (__doc__ or "").splitlines()[0])
        with graceful_run(config):
            fit(EmojiClassifierTask(config), config)
        print(f"The classifier is in {config.out}")


if __name__ == "__main__":
    main()
