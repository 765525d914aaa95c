"""Counts and relations in what a model draws of Toybox, by the judge of whole scenes."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dalle1.data.toybox import Scene
from dalle1.data.toybox.captions import NUMBERS, article, plural
from dalle1.data.toybox.kinds import Kind, scenes
from dalle1.data.toybox.scene import TRAINING
from dalle1.evaluation.toybox import TRUSTED
from dalle1.scene_judge import SceneJudge, SceneVerdict, scene_accuracy

if TYPE_CHECKING:
    from dalle1.pipeline import DallE

KINDS: tuple[Kind, ...] = ("count", "relation")
COUNTS = 2  # two or three alike


@dataclass(frozen=True, kw_only=True)
class ScenePrompt:
    """What is asked for, and the seed of its draw."""

    text: str
    scene: Scene
    seed: int


@dataclass(frozen=True, kw_only=True)
class SceneAnswer:
    """What the judge saw in every candidate, in the order of the draw."""

    prompt: ScenePrompt
    seen: list[SceneVerdict]
    best: int | None  # index of the candidate that is ranked first; None where nothing ranks

    def share(self, indices: Sequence[int], what: str) -> float:
        """Give the share of candidates that are right in `layout` alone, or in `all`."""
        scene = self.prompt.scene
        hits = [
            self.seen[i].shows(scene) if what == "all" else self.seen[i].lies_as(scene)
            for i in indices
        ]
        return sum(hits) / len(hits)


def plain_caption(scene: Scene) -> str:
    """Say what things there are, how many, and where, in as few words as can be."""
    first = scene.items[0]
    if scene.relation is None and len(scene.items) > 1:
        return f"{NUMBERS[len(scene.items)]} {first.fill} {plural(first.noun)}"
    return f" {scene.relation} ".join(f"{article(x.fill)} {x.noun}" for x in scene.items)


def choose_scenes(kind: Kind, count: int, seed: int) -> list[ScenePrompt]:
    """Choose `count` prompts of a kind, of pairs that training sees, each a different one.

    ValueError where there are not so many.
    """
    if kind == "count" and count > COUNTS * len(TRAINING):
        raise ValueError(
            f"num_scenes is {count}, expected at most {COUNTS * len(TRAINING)}: two or three "
            f"things of each of {len(TRAINING)} training pairs"
        )
    stream = scenes("validation", f"evaluate {kind} {seed}", kind)
    rng = random.Random(f"evaluate {kind} {seed}")
    found: dict[str, ScenePrompt] = {}
    while len(found) < count:
        scene = next(stream)
        text = plain_caption(scene)
        if text not in found:
            found[text] = ScenePrompt(text=text, scene=scene, seed=rng.getrandbits(31))
    return list(found.values())


def ask(model: DallE, judge: SceneJudge, prompt: ScenePrompt, num_candidates: int) -> SceneAnswer:
    """Draw one prompt's candidates and judge them all."""
    drawn = model.candidates(prompt.text, num_candidates=num_candidates, seed=prompt.seed)
    in_order = sorted(drawn, key=lambda candidate: candidate.index)
    seen = judge.scene_verdicts([candidate.image for candidate in in_order])
    best = drawn[0].index if drawn[0].score is not None else None
    return SceneAnswer(prompt=prompt, seen=seen, best=best)


def scene_scores(kind: str, answers: Sequence[SceneAnswer]) -> Iterator[tuple[str, float]]:
    """Yield `KIND/CHOICE/WHAT`: choices best, first and mean; the layout alone, and all of it."""
    for choice in ("best", "first", "mean"):
        if choice == "best" and any(answer.best is None for answer in answers):
            continue
        for what in ("layout", "all"):
            shares = [
                answer.share(
                    {"best": [answer.best or 0], "first": [0]}.get(choice, range(len(answer.seen))),
                    what,
                )
                for answer in answers
            ]
            yield f"{kind}/{choice}/{what}", sum(shares) / len(shares)


def check_scene_judge(judge: SceneJudge, pictures: int, seed: int) -> Iterator[tuple[str, float]]:
    """Yield how often the judge is right on real renderings of each kind, and on degraded ones.

    Names: `judge/KIND/WHAT` and `judge/KIND, degraded/WHAT`; WHAT is a head's name, or all.
    """
    for kind in KINDS:
        for name, degraded in ((kind, False), (f"{kind}, degraded", True)):
            phrase = f"{'blurred' if degraded else 'check'} {kind} {seed}"
            for what, share in scene_accuracy(judge, kind, pictures // 2, phrase, degraded):
                yield f"judge/{name}/{what}", share


def report_scene_judge(scores: Mapping[str, float], pictures: int) -> None:
    """Print how often the judge is right, with a warning when that is not often enough."""
    for kind in KINDS:
        found = scores[f"judge/{kind}/all"]
        print(
            f"judge on {pictures // 2} real renderings of {kind}s: "
            f"layout {scores[f'judge/{kind}/layout']:.1%}, all {found:.1%}"
        )
        if found < TRUSTED:
            print(f"warning: the judge is below {TRUSTED:.0%}: trust it less", file=sys.stderr)
