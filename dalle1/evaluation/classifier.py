"""The Toybox classifier: a small network that recognizes what a Toybox image shows.

It predicts the layout (how many objects, or which relation), and each object's noun, fill and
style. The paper asked people to rate samples (appendix F); a classifier makes the measurement
repeatable. It is trained on renderings of all pairs, including held-out ones, and never sees a
caption. Training images are blurred, blocky and shifted, as a dVAE's reconstructions are. Of two
objects, "near" is the left or upper one, "far" is the other.

Legend: B batch, C channels, H W pixels, h w positions, S slots: identical objects, near, far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from PIL import Image
from torch import Tensor, nn

from dalle1.data.images import to_float, to_tensor
from dalle1.storage import load_weights, model_folder, save_weights
from dalle1.toybox import FILL_SURVIVES, FILLS, NOUNS, STYLES, Scene
from dalle1.toybox.scene import Pair

FILE_NAME = "classifier.safetensors"
BUNDLED = Path(__file__).parents[1] / "bundled" / "toybox" / FILE_NAME
PLAIN = "plain"  # the style of an image without one
LAYOUTS = ("one", "two", "three", "four", "across", "down")
"""One to four identical objects, or two kinds of objects in a row or a column."""
COUNTS = 3  # identical objects of one kind, at most, where there are two kinds
SLOTS = 3
ASPECTS = ("noun", "fill", "both", "count", "relation", "style", "all")
"""What is scored in each image; "both" is noun and fill together."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Input size, widths and classes of the Toybox classifier."""

    nouns: tuple[str, ...] = NOUNS
    fills: tuple[str, ...] = FILLS
    styles: tuple[str, ...] = (PLAIN, *STYLES)
    image_size: int = 112
    widths: tuple[int, ...] = (24, 48, 96, 160)

    def __post_init__(self) -> None:
        for field in fields(self):  # a file's metadata has lists
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        if not self.nouns or not self.fills or not self.styles:
            raise ValueError("the classifier needs at least one noun, one fill and one style")
        if len(self.widths) < 2:
            raise ValueError(f"widths is {self.widths}, expected at least a stem and one stage")
        if self.image_size < 1 << len(self.widths) or self.image_size % (1 << len(self.widths)):
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {1 << len(self.widths)}"
            )


@dataclass(frozen=True)
class Verdict:
    """What the classifier recognizes in one image."""

    layout: str
    things: tuple[Pair, ...]
    """(fill, noun) pairs: one for identical objects; near, then far, for two kinds."""
    counts: tuple[int, ...] = ()
    """Numbers of near and of far objects, where there are two kinds."""
    style: str = PLAIN

    def compare(self, scene: Scene) -> dict[str, bool | None]:
        """Return whether each of `ASPECTS` is as in `scene`; None where it does not apply.

        Nouns, fills, pairs of both and counts are correct wherever they are in the image. A
        relation is correct if the recognized objects match the requested order better than the
        reversed one. Only "all" requires everything in its position. A style may hide fills.
        """
        wanted = true_verdict(scene)
        visible = fills_are_visible(scene)
        nouns_match = self._sorted(1) == wanted._sorted(1)
        fills_match = self._sorted(0) == wanted._sorted(0)
        style = self.style == wanted.style
        same_layout = (self.layout, self._counts) == (wanted.layout, wanted._counts)
        same_things = self.things == wanted.things if visible else self._nouns() == wanted._nouns()
        return {
            "noun": nouns_match,
            "fill": fills_match if visible else None,
            "both": sorted(self.things) == sorted(wanted.things) if visible else None,
            "count": sorted(self._counts) == sorted(wanted._counts),
            "relation": None if scene.relation is None else self._matches_relation(wanted),
            "style": style,
            "all": same_layout and same_things and style,
        }

    @property
    def _counts(self) -> tuple[int, ...]:
        return self.counts or (LAYOUTS.index(self.layout) + 1,)

    def _nouns(self) -> list[str]:
        return [noun for _, noun in self.things]

    def _sorted(self, part: int) -> list[str]:
        return sorted(pair[part] for pair in self.things)

    def _matches_relation(self, wanted: Verdict) -> bool:
        """Whether the order is as wanted, judged by nouns first, then by fills."""
        near, far = wanted.things

        def agreement(*order: Pair) -> list[int]:
            pairs = list(zip(self.things, order))
            return [sum(seen[part] == asked[part] for seen, asked in pairs) for part in (1, 0)]

        return self.layout == wanted.layout and agreement(near, far) > agreement(far, near)


def fills_are_visible(scene: Scene) -> bool:
    """Whether the fills of a scene can be recognized in its style."""
    return scene.style is None or all(i.fill in FILL_SURVIVES[scene.style] for i in scene.items)


def true_verdict(scene: Scene) -> Verdict:
    """Return the verdict that is correct for a scene."""
    groups, style = scene.groups, scene.style or PLAIN
    if scene.relation is None:
        return Verdict(LAYOUTS[len(scene.items) - 1], (scene.items[0].pair,), style=style)
    if scene.relation in ("right of", "below"):
        groups = groups[::-1]
    layout = "across" if scene.relation.endswith(" of") else "down"
    pairs, counts = tuple(g[0].pair for g in groups), tuple(map(len, groups))
    return Verdict(layout, pairs, counts, style)


@dataclass(frozen=True)
class ClassifierLogits:
    """Logits of all predictions."""

    layout: Tensor  # [B, layouts]
    style: Tensor  # [B, styles]
    counts: Tensor  # [B, 2, COUNTS]: near, far
    fills: Tensor  # [B, S, fills]
    nouns: Tensor  # [B, S, nouns]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a 1×1 shortcut; halves the resolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] → [B, C_out, H/2, W/2]
        return F.relu(self.body(x) + self.shortcut(x))


class ToyboxClassifier(nn.Module):
    """A small residual network with one spatial attention map for each slot."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.coordinates: Tensor
        stem, *_, last = config.widths
        side = config.image_size >> len(config.widths)
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        self.stages = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(config.widths)))
        self.whole = nn.Sequential(nn.Conv2d(last, 24, 1), nn.ReLU(), nn.Flatten())
        self.context = nn.Sequential(nn.Linear(24 * side**2, last), nn.ReLU())
        self.scene = nn.Linear(last, len(LAYOUTS) + len(config.styles) + 2 * COUNTS)
        ramp = torch.linspace(-1, 1, side)
        self.register_buffer("coordinates", torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")))
        self.register_load_state_dict_pre_hook(_rename_buffer)
        self.look = nn.Sequential(nn.Conv2d(2 * last + 2, last, 1), nn.ReLU())
        self.where = nn.Conv2d(last, SLOTS, 1)
        self.noun = nn.Linear(2 * last, len(config.nouns))
        self.fill = nn.Linear(2 * last, len(config.fills))

    def forward(self, images: Tensor) -> ClassifierLogits:
        """Compute all logits for `images` [B, 3, H, W] in [0, 1]."""
        size = (self.config.image_size, self.config.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        x = (2 * images - 1).to(memory_format=torch.channels_last)
        x = self.stages(self.stem(x))  # [B, C, h, w]
        context = self.context(self.whole(x))  # [B, C]
        sizes = (len(LAYOUTS), len(self.config.styles), 2 * COUNTS)
        layout, style, counts = self.scene(context).split(sizes, 1)
        spread = context[..., None, None].expand(-1, -1, *x.shape[2:])
        coordinates = self.coordinates.to(x.dtype).expand(len(x), -1, -1, -1)
        attention = self.where(self.look(torch.cat([x, spread, coordinates], 1)))
        weights = attention.flatten(2).float().softmax(2)  # [B, S, h·w]
        mean = einsum(weights.to(x.dtype), x.flatten(2), "b s p, b c p -> b s c")
        # The mean recognizes textures, the maximum of what is attended to recognizes small parts.
        peak = weights / weights.amax(2, keepdim=True)
        largest = (x.flatten(2)[:, None] * peak[:, :, None].to(x.dtype)).amax(3)  # [B, S, C]
        slots = torch.cat([mean, largest], 2)
        counts = rearrange(counts, "b (two n) -> b two n", two=2)
        return ClassifierLogits(layout, style, counts, self.fill(slots), self.noun(slots))

    @torch.inference_mode()
    def classify(self, images: Sequence[Image.Image], batch_size: int = 64) -> list[Verdict]:
        """Return the verdict on each image; the network must be in evaluation mode."""
        assert not self.training, "call .eval() first: batch statistics would leak between images"
        device = self.noun.weight.device
        verdicts: list[Verdict] = []
        for start in range(0, len(images), batch_size):
            batch = [to_tensor(x.convert("RGB")) for x in images[start : start + batch_size]]
            verdicts += self.verdicts(self(to_float(torch.stack(batch).to(device))))
        return verdicts

    def verdicts(self, logits: ClassifierLogits) -> Iterator[Verdict]:
        """Yield the most likely verdict on each image of a batch."""
        config = self.config
        parts = (logits.layout, logits.style, logits.counts, logits.fills, logits.nouns)
        rows = zip(*(part.argmax(-1).tolist() for part in parts))
        for layout, style, counts, fills, nouns in rows:
            same, *two = ((config.fills[f], config.nouns[n]) for f, n in zip(fills, nouns))
            name, style = LAYOUTS[layout], config.styles[style]
            if name in ("across", "down"):
                yield Verdict(name, tuple(two), tuple(count + 1 for count in counts), style)
            else:
                yield Verdict(name, (same,), style=style)


def _rename_buffer(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read files of earlier versions, which call the coordinates "places"."""
    if (old := f"{prefix}places") in state_dict:
        state_dict[f"{prefix}coordinates"] = state_dict.pop(old)


def save_classifier(classifier: ToyboxClassifier, path: Path) -> None:
    """Write the weights as half-precision safetensors, with the config in the metadata."""
    save_weights(classifier, path, torch.float16)


def load_classifier(
    path: str | Path = BUNDLED, device: str | torch.device = "cpu"
) -> ToyboxClassifier:
    """Load a classifier from its file or a training's folder, in evaluation mode.

    Raises: ValueError where the file is missing, damaged or something else.
    """
    path = model_folder(path)
    path = path / FILE_NAME if path.is_dir() else path
    return load_weights(ToyboxClassifier, ClassifierConfig, path, device)
