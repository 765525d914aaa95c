"""The judge: a small network that says what a Toybox picture shows.

How many things or which one where, which nouns, which fills, in which style. Not in the paper,
which asked people (appendix F). Here a classifier answers, so that anyone can repeat the count: it
sees renderings of every pair, held-out pairs too, and never a caption. It is trained on blurred,
blocky and shifted renderings so that it forgives what a discrete VAE does to a picture
(`classifier_training`), and `evaluate.py` measures it on clean renderings before it believes a
word it says. Of two things "near" is the one to the left or above, "far" the other.

Legend: B batch, C channels, H W pixels, h w places, S slots: things alike, near, far.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dalle1.files import write_atomic
from dalle1.toybox import FILL_SURVIVES, FILLS, NOUNS, STYLES, Scene
from dalle1.toybox.scene import Pair

BUNDLED = Path(__file__).parents[1] / "bundled" / "toybox" / "classifier.safetensors"
PLAIN = "plain"  # the style of a picture without one
LAYOUTS = ("one", "two", "three", "four", "across", "down")
"""So many things alike, or two kinds in a row or a column."""
COUNTS = 3  # of things alike, at most, where there are two kinds
SLOTS = 3
WHAT = ("noun", "fill", "both", "count", "relation", "style", "all")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What the judge looks at, and the names it may answer with."""

    nouns: tuple[str, ...] = NOUNS
    fills: tuple[str, ...] = FILLS
    styles: tuple[str, ...] = (PLAIN, *STYLES)
    image_size: int = 112
    widths: tuple[int, ...] = (24, 48, 96, 160)

    def __post_init__(self) -> None:
        if not self.nouns or not self.fills or not self.styles:
            raise ValueError("a judge needs at least one noun, one fill and one style")
        if len(self.widths) < 2:
            raise ValueError(f"widths must name a stem and a stage at least, got {self.widths}")
        if self.image_size < 1 << len(self.widths) or self.image_size % (1 << len(self.widths)):
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {1 << len(self.widths)}"
            )


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one picture."""

    layout: str
    things: tuple[Pair, ...]
    """(fill, noun): of things alike once; of two kinds near, then far."""
    counts: tuple[int, ...] = ()
    """Of two kinds: how many near, how many far."""
    style: str = PLAIN

    def right(self, scene: Scene) -> dict[str, bool | None]:
        """Say what of a scene is there: `WHAT`, None where it is not asked.

        Nouns, fills, both joined and counts are right wherever they are in the picture. A relation
        is right if what is recognised lies the way that was asked for rather than the other way
        round. Only "all" asks for everything in its place. A style may hide fills.
        """
        wanted = truth(scene)
        fills, nouns = (self._has(wanted, part) for part in (0, 1))
        told = fills_count(scene)
        both = sorted(self.things) == sorted(wanted.things)
        count = sorted(self._many) == sorted(wanted._many)
        style = self.style == wanted.style
        in_place = (self.layout, self._many) == (wanted.layout, wanted._many) and (
            self.things == wanted.things
            if told
            else [noun for _, noun in self.things] == [noun for _, noun in wanted.things]
        )
        return {
            "noun": nouns,
            "fill": fills if told else None,
            "both": both if told else None,
            "count": count,
            "relation": None if scene.relation is None else self._lies_as(wanted),
            "style": style,
            "all": in_place and style,
        }

    @property
    def _many(self) -> tuple[int, ...]:
        return self.counts or (LAYOUTS.index(self.layout) + 1,)

    def _has(self, wanted: Verdict, part: int) -> bool:
        return sorted(p[part] for p in self.things) == sorted(p[part] for p in wanted.things)

    def _lies_as(self, wanted: Verdict) -> bool:
        near, far = wanted.things

        def agreement(
            *order: Pair,
        ) -> list[int]:  # of nouns first, of fills where these tell nothing
            pairs = list(zip(self.things, order))
            return [sum(seen[part] == asked[part] for seen, asked in pairs) for part in (1, 0)]

        return self.layout == wanted.layout and agreement(near, far) > agreement(far, near)


def fills_count(scene: Scene) -> bool:
    """Say whether the fills of a scene can be told in its style."""
    return scene.style is None or all(i.fill in FILL_SURVIVES[scene.style] for i in scene.items)


def truth(scene: Scene) -> Verdict:
    """Give the verdict that is right of a scene."""
    groups, style = scene.groups, scene.style or PLAIN
    if scene.relation is None:
        return Verdict(LAYOUTS[len(scene.items) - 1], (scene.items[0].pair,), style=style)
    if scene.relation in ("right of", "below"):
        groups = groups[::-1]
    layout = "across" if scene.relation.endswith(" of") else "down"
    pairs, counts = tuple(g[0].pair for g in groups), tuple(map(len, groups))
    return Verdict(layout, pairs, counts, style)


@dataclass(frozen=True)
class Answers:
    """Logits for all questions."""

    layout: Tensor  # [B, layouts]
    style: Tensor  # [B, styles]
    counts: Tensor  # [B, 2, COUNTS]: near, far
    fills: Tensor  # [B, S, fills]
    nouns: Tensor  # [B, S, nouns]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a 1×1 shortcut; halves the picture."""

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


class Judge(nn.Module):
    """A small residual network that looks for each slot at the places where its things are."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        self.places: Tensor
        stem, *_, last = config.widths
        side = config.image_size >> len(config.widths)
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        self.stages = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(config.widths)))
        self.whole = nn.Sequential(nn.Conv2d(last, 24, 1), nn.ReLU(), nn.Flatten())
        self.context = nn.Sequential(nn.Linear(24 * side**2, last), nn.ReLU())
        sizes = len(LAYOUTS) + len(config.styles) + 2 * COUNTS
        self.scene = nn.Linear(last, sizes)
        ramp = torch.linspace(-1, 1, side)
        self.register_buffer("places", torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")))
        self.look = nn.Sequential(nn.Conv2d(2 * last + 2, last, 1), nn.ReLU())
        self.where = nn.Conv2d(last, SLOTS, 1)
        self.noun = nn.Linear(2 * last, len(config.nouns))
        self.fill = nn.Linear(2 * last, len(config.fills))

    def forward(self, images: Tensor) -> Answers:
        """Answer all questions about `images` [B, 3, H, W] in [0, 1]."""
        size = (self.config.image_size, self.config.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        x = (2 * images - 1).to(memory_format=torch.channels_last)
        x = self.stages(self.stem(x))  # [B, C, h, w]
        context = self.context(self.whole(x))  # [B, C]
        sizes = (len(LAYOUTS), len(self.config.styles), 2 * COUNTS)
        layout, style, counts = self.scene(context).split(sizes, 1)
        spread = context[..., None, None].expand(-1, -1, *x.shape[2:])
        places = self.places.to(x.dtype).expand(len(x), -1, -1, -1)
        attention = self.where(self.look(torch.cat([x, spread, places], 1)))
        weights = attention.flatten(2).float().softmax(2)  # [B, S, h·w]
        seen = einsum(weights.to(x.dtype), x.flatten(2), "b s p, b c p -> b s c")
        # The mean tells textures, the maximum of what is looked at tells small parts.
        peak = weights / weights.amax(2, keepdim=True)
        most = (x.flatten(2)[:, None] * peak[:, :, None].to(x.dtype)).amax(3)  # [B, S, C]
        things = torch.cat([seen, most], 2)
        counts = rearrange(counts, "b (two n) -> b two n", two=2)
        return Answers(layout, style, counts, self.fill(things), self.noun(things))

    @torch.inference_mode()
    def verdicts(self, pictures: Sequence[Image.Image], batch_size: int = 64) -> list[Verdict]:
        """Say what each picture shows; the network must be in evaluation mode."""
        assert not self.training, "call .eval() first: batch statistics would leak between pictures"
        device = self.noun.weight.device
        found = []
        for start in range(0, len(pictures), batch_size):
            batch = as_tensor(pictures[start : start + batch_size]).to(device)
            answers = self(batch.float() / 255)
            kinds = (answers.layout, answers.style, answers.counts, answers.fills, answers.nouns)
            found += [self._verdict(*row) for row in zip(*(k.argmax(-1).tolist() for k in kinds))]
        return found

    def _verdict(
        self, layout: int, style: int, counts: list[int], fills: list[int], nouns: list[int]
    ) -> Verdict:
        alike, *two = ((self.config.fills[f], self.config.nouns[n]) for f, n in zip(fills, nouns))
        name, of = LAYOUTS[layout], self.config.styles[style]
        if name in ("across", "down"):
            return Verdict(name, tuple(two), tuple(count + 1 for count in counts), of)
        return Verdict(name, (alike,), style=of)


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Stack RGB pictures of one size into bytes [B, 3, H, W]."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def save_judge(judge: Judge, path: str | Path) -> None:
    """Write the weights as half-precision safetensors, with the config in the metadata."""
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in judge.state_dict().items()
    }
    write_atomic(Path(path), save(tensors, metadata={"config": json.dumps(asdict(judge.config))}))


def load_judge(path: str | Path = BUNDLED) -> Judge:
    """Read a judge back, ready to use; a `ValueError` if the file is not one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no judge at {path}: train one with `evaluate.py judge`")
    try:
        with safe_open(path, framework="pt") as file:
            fields = json.loads((file.metadata() or {})["config"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        judge = Judge(JudgeConfig(**(fields | lists)))
        judge.load_state_dict(tensors)
    except (
        SafetensorError, KeyError, TypeError, ValueError, RuntimeError, json.JSONDecodeError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a judge of `evaluate.py judge`: {reason}") from error
    return judge.eval()
