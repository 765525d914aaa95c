"""What a model draws of Toybox prompts, counted by a small classifier that never reads them.

The question of the paper's figure 2: can the model join words that it never saw together? Prompts
from held-out pairs beside as many from training pairs, of one thing, of two kinds in a relation, of
things to count and in styles; the best of N candidates by CLIP (section 2.6), for several N of the
same candidates. More candidates take longer, so that each N has its own number of prompts.
"""

from __future__ import annotations

import math
import random
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from dalle1.evaluation.classifier import WHAT, Judge, Verdict
from dalle1.evaluation.classifier_training import PICTURE_SIZE, accuracy
from dalle1.evaluation.report import wilson
from dalle1.toybox import Scene, is_held_out, is_style_held_out, sample_scene
from dalle1.toybox.captions import plain_caption
from dalle1.toybox.kinds import kind_of, scenes

if TYPE_CHECKING:
    from dalle1.pipeline import DallE
    from dalle1.sampling.decoding import Sampling

SPLITS = {"heldout": "held-out", "train": "training"}
KINDS = ("one", "two", "count", "style")
"""Of scenes that are asked for; see `dalle1.toybox.kinds`."""
TURNS = ("one", "two", "style", "one", "two", "count", "one", "style", "two", "one")
"""Prompts take these turns, so that the first of them have all kinds, too."""
MOST_PROMPTS = 400  # of a split; there are no more held-out pairs for the prompts of one thing
AT_ONCE = 128  # candidates, of several prompts together
MOST_TOGETHER = 32  # prompts, since they share their random numbers
TRUSTED = 0.98  # below this accuracy on real renderings the judge's word is not worth much


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question to the model, and what would be the right picture."""

    text: str
    scene: Scene
    kind: str
    split: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the judge saw in every candidate of one prompt, in the order of the draw."""

    prompt: Prompt
    seed: int
    seen: list[Verdict]
    scores: list[float] | None  # by which CLIP ranks; None without a CLIP

    def best(self, count: int) -> int:
        """Give the index of the best of the first `count` candidates; the first without a CLIP."""
        scores = self.scores or [0.0] * len(self.seen)
        return max(range(count), key=lambda index: (scores[index], -index))

    def right(self, count: int) -> dict[str, bool | None]:
        """Say what is right about the best of the first `count` candidates."""
        return self.seen[self.best(count)].right(self.prompt.scene)


def choose_prompts(split: str, count: int, seed: int) -> list[Prompt]:
    """Choose `count` plain prompts of one split, each a different one, in turns of all kinds.

    A held-out prompt of the kind "style" has a held-out pair of style and noun, and a fill that is
    no surprise; all other held-out prompts have a held-out pair of fill and noun.
    """
    if count > MOST_PROMPTS:
        raise ValueError(f"num_prompts is {count}, expected at most {MOST_PROMPTS}")
    rng = random.Random(f"evaluate {split} {seed}")
    found: dict[str, Prompt] = {}
    waiting: dict[str, list[Scene]] = {kind: [] for kind in (*KINDS, "other")}
    while len(found) < count:
        kind = TURNS[len(found) % len(TURNS)]
        while not waiting[kind]:
            scene = sample_scene(rng, "validation" if split == "train" else split)
            waiting[kind_of(scene)].append(scene)
        scene = waiting[kind].pop(0)
        text = plain_caption(scene)
        by_fill = any(is_held_out(*item.pair) for item in scene.items)
        by_style = scene.style is not None and is_style_held_out(scene.style, scene.items[0].noun)
        wanted = (by_style and not by_fill) if kind == "style" else by_fill
        if text not in found and (wanted or split == "train"):
            found[text] = Prompt(text=text, scene=scene, kind=kind, split=split)
    return list(found.values())


def most_candidates(place: int, num_prompts: Sequence[int], best_of: Sequence[int]) -> int:
    """Say how many candidates the prompt in that place of its split is drawn."""
    return max((n for n, prompts in zip(best_of, num_prompts) if place < prompts), default=0)


def ask(
    model: DallE,
    judge: Judge,
    prompts: Sequence[Prompt],
    num_candidates: int,
    seed: int,
    sampling: Sampling,
) -> Iterator[tuple[Answer, Image.Image]]:
    """Draw the candidates of some prompts and judge them all; yield each with the best picture."""
    texts = [prompt.text for prompt in prompts]
    drawn = model.draw(texts, num_candidates=num_candidates, seed=seed, **asdict(sampling))
    for prompt, candidates in zip(prompts, drawn, strict=True):
        in_order = sorted(candidates, key=lambda candidate: candidate.index)
        seen = judge.verdicts([candidate.image for candidate in in_order])
        scores = [candidate.score for candidate in in_order if candidate.score is not None]
        yield (
            Answer(prompt=prompt, seed=seed, seen=seen, scores=scores or None),
            candidates[0].image,
        )


def batches_of(
    num_prompts: Sequence[int], best_of: Sequence[int], seed: int
) -> Iterator[tuple[list[Prompt], int, int]]:
    """Yield prompts with as many candidates together: them, how many candidates, and their seed.

    Candidate i of all prompts of a batch is drawn with the same random numbers.
    """
    rng = random.Random(f"draws {seed}")
    for split in SPLITS:
        prompts = choose_prompts(split, max(num_prompts), seed)
        groups: dict[int, list[Prompt]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(most_candidates(place, num_prompts, best_of), []).append(prompt)
        for candidates, group in groups.items():
            together = max(1, min(MOST_TOGETHER, AT_ONCE // candidates))
            for start in range(0, len(group), together):
                yield group[start : start + together], candidates, rng.getrandbits(31)


@dataclass(frozen=True)
class Share:
    """How often something was right, of so many prompts."""

    right: int
    count: int

    @property
    def share(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return wilson(self.share, self.count)


def toybox_shares(answers: Sequence[Answer], best_of: Sequence[int]) -> dict[str, Share]:
    """Count by `SPLIT/KIND/best of N/WHAT`; the kind `all` is all of them.

    A best of N counts the prompts that were drawn as many candidates; the kind `same` only those
    that were drawn the most, so that its rows compare. Without a CLIP nothing says which is best,
    and only N = 1 remains.
    """
    found = {}
    for split in SPLITS:
        of_split = [answer for answer in answers if answer.prompt.split == split]
        for kind in ("all", *KINDS, "same"):
            of_kind = [a for a in of_split if kind in ("all", a.prompt.kind)]
            if kind == "same":
                of_kind = [a for a in of_split if len(a.seen) >= max(best_of)]
            for n in best_of:
                group = [a for a in of_kind if len(a.seen) >= n and (n == 1 or a.scores)]
                for what in WHAT:
                    asked = [r for a in group if (r := a.right(n)[what]) is not None]
                    if asked:
                        found[f"{split}/{kind}/best of {n}/{what}"] = Share(sum(asked), len(asked))
    return found


def toybox_table(shares: dict[str, Share]) -> str:
    """Lay the shares out, a row for each split, kind and N, with an interval for all of it."""
    head = "".join(f"{what:>9}" for what in WHAT)
    lines = [f"{'pairs':10}{'kind':7}{'picture':12}{'prompts':>8}{head}   95 % interval"]
    for name in dict.fromkeys(name.rpartition("/")[0] for name in shares):
        split, kind, picture = name.split("/")
        row = [shares.get(f"{name}/{what}") for what in WHAT]
        cells = "".join(f"{part.share:9.1%}" if part else f"{'':9}" for part in row)
        everything = shares[f"{name}/all"]
        low, high = everything.interval
        lines.append(
            f"{SPLITS[split]:10}{kind:7}{picture:12}{everything.count:8}{cells}"
            f"   {low:.1%} to {high:.1%}"
        )
    return "\n".join(lines)


def grid(shown: Sequence[tuple[Image.Image, str, bool]], columns: int = 8) -> Image.Image:
    """Lay pictures out with the prompt under each, and a dot: green if right, red if wrong."""
    side, gap, caption = 128, 12, 32
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    width, height = columns * (side + gap) + gap, rows * (side + gap + caption) + gap
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for place, (picture, text, right) in enumerate(shown):
        x = gap + place % columns * (side + gap)
        y = gap + place // columns * (side + gap + caption)
        sheet.paste(picture.resize((side, side)), (x, y))
        colour = "#3a9d5d" if right else "#c8553d"
        pen.ellipse((x, y + side + 7, x + 5, y + side + 12), fill=colour)
        lines = textwrap.fill(text, 24)
        pen.multiline_text((x + 9, y + side + 4), lines, fill="#333333", font=font, spacing=2)
    return sheet


def check_judge(
    judge: Judge, pictures: int, seed: int, size: int = PICTURE_SIZE
) -> Iterator[tuple[str, float]]:
    """Yield the judge's accuracy on real renderings, half of held-out pairs, half of training.

    They are `size` pixels wide, as what it shall judge.
    """
    for split in SPLITS:
        # The seed is a phrase no training run uses, so the renderings are fresh.
        stream = scenes(split, f"check {split} {seed}")
        for name, share in accuracy(judge, stream, pictures // 2, size=size):
            yield f"judge/{split}/{name}", share


def report_judge(scores: dict[str, float], pictures: int) -> None:
    """Print how often the judge is right, with a warning when that is not often enough."""
    for split, name in SPLITS.items():
        found = {what: scores.get(f"judge/{split}/{what}") for what in WHAT}
        shares = ", ".join(f"{what} {share:.1%}" for what, share in found.items() if share)
        print(f"judge on {pictures // 2} real renderings of {name} pairs: {shares}")
        if scores[f"judge/{split}/all"] < TRUSTED:
            print(f"warning: the judge is below {TRUSTED:.0%}: trust it less", file=sys.stderr)


def details(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Give every prompt with every verdict, for the JSON."""
    return [
        {
            "text": answer.prompt.text,
            "kind": answer.prompt.kind,
            "split": answer.prompt.split,
            "seed": answer.seed,
            "best": answer.best(len(answer.seen)),
            "seen": [spoken(verdict) for verdict in answer.seen],
            "right": [verdict.right(answer.prompt.scene)["all"] for verdict in answer.seen],
        }
        for answer in answers
    ]


def spoken(verdict: Verdict) -> str:
    """Put a verdict into a few words."""
    things = " and ".join(
        f"{count} {fill} {noun}" if count != 1 else f"{fill} {noun}"
        for (fill, noun), count in zip(verdict.things, verdict.counts or (1,))
    )
    return f"{verdict.style}, {verdict.layout}: {things}"
