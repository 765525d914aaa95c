"""A judge of whole scenes: how many things there are, and of two, which one is where.

It looks with the same kind of network as `dalle1.judge`, trained on degraded renderings as well. It
answers from a map of the picture, not from its mean, since it must know where it saw what.
"Near" is left or above, "far" right or below.

Legend: B batch, C channels, h w places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dalle1.data.toybox import Scene, render
from dalle1.data.toybox.kinds import Kind, scenes
from dalle1.judge import (
    PICTURE_SIZE,
    Eye,
    JudgeConfig,
    answer_in_batches,
    as_tensor,
    question,
    read_judge,
    train,
)

BUNDLED = Path(__file__).parent / "bundled" / "scene_judge.safetensors"
LAYOUTS = ("one", "two", "three", "across", "down")
"""Things alike, or two in a row or a column."""
HEADS = ("layout", "fill", "noun", "near fill", "near noun", "far fill", "far noun")
"""What is asked of a picture: fill and noun of things alike, of the near one, of the far one."""
PLACES = 32  # channels of the map that scenes are read from
NONE = -1  # a question that a scene leaves open


@dataclass(frozen=True)
class SceneVerdict:
    """What the judge sees in one picture: things alike, or two that differ."""

    layout: str
    things: tuple[tuple[str, str], ...]
    """(fill, noun): of things alike once; of two near, then far."""

    def shows(self, scene: Scene) -> bool:
        """Say whether that is what the scene was to show."""
        return (self.layout, self.things) == truth(scene)

    def lies_as(self, scene: Scene) -> bool:
        """Say whether there are as many things as in the scene, or two in the same direction."""
        return self.layout == truth(scene)[0]


def truth(scene: Scene) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Give the right layout of a scene and its things as `SceneVerdict` has them."""
    pairs = tuple(item.pair for item in scene.items)
    if scene.relation is None:
        return LAYOUTS[len(pairs) - 1], pairs[:1]
    near_first = scene.relation in ("left of", "above")
    layout = "across" if scene.relation.endswith(" of") else "down"
    return layout, pairs if near_first else pairs[::-1]


class SceneJudge(Eye):
    """An eye whose answers are read off a map of the picture."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__(config)
        side = config.image_size >> len(config.widths)
        if side < 1 or config.image_size % (1 << len(config.widths)):
            raise ValueError(
                f"image_size is {config.image_size}, expected a multiple of "
                f"{1 << len(config.widths)}"
            )
        kinds = (len(config.fills), len(config.nouns))
        self.sizes = (len(LAYOUTS), *kinds, *kinds, *kinds)
        self.places = nn.Conv2d(config.widths[-1], PLACES, 1)
        self.scene = nn.Linear(PLACES * side**2, sum(self.sizes))

    def ask(self, images: Tensor) -> list[Tensor]:
        """Return logits for `images` [B, 3, H, W] in [0, 1].

        Returns: of the layout; of fill and noun of things alike, of the near one, of the far one.
        """
        seen = self.places(self.features(images)).relu().flatten(1)
        return list(self.scene(seen).split(self.sizes, 1))

    @torch.inference_mode()
    def scene_verdicts(
        self, pictures: Sequence[Image.Image], batch_size: int = 64
    ) -> list[SceneVerdict]:
        """Say what each picture shows; the network must be in evaluation mode."""
        assert not self.training, "call .eval() first: batch statistics would leak between pictures"
        found = []
        fills, nouns = self.config.fills, self.config.nouns
        for start in range(0, len(pictures), batch_size):
            batch = as_tensor(pictures[start : start + batch_size]).to(self.scene.weight.device)
            answers = (logits.argmax(1).tolist() for logits in self.ask(batch.float() / 255))
            for layout, *rest in zip(*answers):
                alike, near, far = ((fills[f], nouns[n]) for f, n in zip(rest[::2], rest[1::2]))
                things = (alike,) if layout < 3 else (near, far)
                found.append(SceneVerdict(LAYOUTS[layout], things))
        return found


def load_scene_judge(path: str | Path = BUNDLED) -> SceneJudge:
    """Read a judge of scenes back, ready to use; a `ValueError` if the file is not one."""
    return read_judge(path, SceneJudge, "evaluate.py judge --scenes")


def answers_of(scene: Scene, config: JudgeConfig) -> list[int]:
    """Give the index of the right answer to each question, `NONE` where it is not asked."""
    layout, things = truth(scene)
    places = (*things, None, None) if scene.relation is None else (None, *things)
    found = [LAYOUTS.index(layout)]
    for pair in places:  # alike, near, far
        if pair is None:
            found += [NONE, NONE]
        else:
            found += [config.fills.index(pair[0]), config.nouns.index(pair[1])]
    return found


def train_scene_judge(
    config: JudgeConfig,
    *,
    pictures: int,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    kept: Path | None = None,
) -> SceneJudge:
    """Render scenes of all pairs, half of them relations, and train a judge on them.

    `kept` is where the training may be interrupted to; see `judge.train`.
    """
    kinds: tuple[Kind, ...] = ("any", "relation")
    streams = [scenes("all", f"train {seed} {i}", kind) for i, kind in enumerate(kinds)]
    drawn, answers = [], []
    for i in tqdm(range(pictures), desc="rendering scenes", unit="picture", leave=False):
        scene = next(streams[i % 2])
        drawn.append(as_tensor([render(scene, PICTURE_SIZE)]))
        answers.append(answers_of(scene, config))
    targets = torch.tensor(answers)

    def loss(judge: SceneJudge, images: Tensor, chosen: Tensor) -> Tensor:
        asked = zip(judge.ask(images), targets[chosen].unbind(1))
        return torch.stack([question(logits, right) for logits, right in asked]).sum()

    options: dict[str, Any] = {"steps": steps, "seed": seed, "batch_size": batch_size}
    return train(SceneJudge, config, torch.cat(drawn), loss, kept=kept, **options)


def scene_accuracy(
    judge: SceneJudge, kind: Kind, count: int, seed: str, degraded: bool = False
) -> Iterator[tuple[str, float]]:
    """Yield how often each head is right that is asked, and all of a scene is.

    On `count` fresh renderings of all pairs; with `degraded`, treated as in training.
    """
    stream = scenes("all", seed, kind)
    shown = [next(stream) for _ in range(count)]
    pictures = as_tensor([render(scene, PICTURE_SIZE) for scene in shown])
    truths = torch.tensor([answers_of(scene, judge.config) for scene in shown])  # [count, heads]
    answers = answer_in_batches(judge.ask, pictures, judge.config, degraded)
    asked, right = truths != NONE, torch.stack(answers, 1) == truths
    for i, name in enumerate(HEADS):
        if asked[:, i].any():
            yield name, right[asked[:, i], i].float().mean().item()
    yield "all", (right | ~asked).all(1).float().mean().item()
