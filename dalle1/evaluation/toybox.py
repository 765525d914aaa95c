"""What a model draws of Toybox prompts, counted by a small classifier that never reads them.

The question of the paper's figure 2: can the model join words that it never saw together? Prompts
from held-out pairs beside as many from training pairs, the best of N candidates by CLIP (section
2.6) beside the first candidate alone.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from dalle1.data.toybox import FILLS, NOUNS, is_held_out
from dalle1.data.toybox.captions import article
from dalle1.evaluation.report import wilson
from dalle1.judge import Judge, Verdict, accuracy

if TYPE_CHECKING:
    from dalle1.pipeline import DallE

SPLITS = {"heldout": "held-out", "train": "training"}
CHOICES = {"best": "best of {n} by CLIP", "first": "first candidate", "mean": "mean of {n}"}
TRUSTED = 0.98  # below this accuracy on real renderings the judge's word is not worth much


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question to the model, and the seed of its draw."""

    text: str
    noun: str
    fill: str
    split: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the judge saw in every candidate of one prompt, in the order of the draw."""

    prompt: Prompt
    seen: list[Verdict]
    best: int | None  # index of the candidate that CLIP ranks first; None without a CLIP

    def right(self, index: int) -> dict[str, bool]:
        """Say whether candidate `index` has the right noun, the right fill, and both."""
        noun = self.seen[index].noun == self.prompt.noun
        fill = self.seen[index].fill == self.prompt.fill
        return {"noun": noun, "fill": fill, "both": noun and fill}

    def chosen(self, choice: str) -> list[int]:
        """Return the candidates a choice looks at: best, first or mean; none if there is none."""
        best = [] if self.best is None else [self.best]
        return {"best": best, "first": [0], "mean": list(range(len(self.seen)))}[choice]


def choose_prompts(split: str, count: int, seed: int) -> list[Prompt]:
    """Choose `count` plain prompts of one split, each of another pair."""
    wanted = split == "heldout"
    pairs = [(n, f) for n in NOUNS for f in FILLS if is_held_out(fill=f, noun=n) == wanted]
    rng = random.Random(f"evaluate {split} {seed}")
    rng.shuffle(pairs)
    prompts = []
    if count > len(pairs):
        raise ValueError(
            f"num_prompts is {count}, expected at most {len(pairs)}: the {split} pairs"
        )
    for noun, fill in pairs[:count]:
        prompts.append(
            Prompt(
                text=f"{article(fill)} {noun}",
                noun=noun,
                fill=fill,
                split=split,
                seed=rng.getrandbits(31),
            )
        )
    return prompts


def ask(
    model: DallE, judge: Judge, prompt: Prompt, num_candidates: int
) -> tuple[Answer, Image.Image]:
    """Draw one prompt's candidates and judge them all; return the one to show as well."""
    drawn = model.candidates(prompt.text, num_candidates=num_candidates, seed=prompt.seed)
    in_order = sorted(drawn, key=lambda candidate: candidate.index)
    seen = judge.verdicts([candidate.image for candidate in in_order])
    ranked = drawn[0].score is not None
    best = drawn[0].index if ranked else None
    return Answer(prompt=prompt, seen=seen, best=best), (drawn if ranked else in_order)[0].image


def toybox_scores(answers: Sequence[Answer]) -> Iterator[tuple[str, float]]:
    """Yield `(split/choice/what, share)`: choices best, first and mean; noun, fill and both."""
    for split in SPLITS:
        group = [answer for answer in answers if answer.prompt.split == split]
        for choice in CHOICES:
            chosen = [answer.chosen(choice) for answer in group]
            if not all(chosen):
                continue  # no best without a CLIP
            for what in ("noun", "fill", "both"):
                shares = [
                    sum(answer.right(index)[what] for index in indices) / len(indices)
                    for answer, indices in zip(group, chosen)
                ]
                yield f"{split}/{choice}/{what}", sum(shares) / len(shares)


def toybox_table(scores: dict[str, float], prompts: int, candidates: int) -> str:
    """Lay the scores out, one row per split and choice, with an interval for both.

    Candidates of one prompt are not independent, so the interval of their mean counts prompts.
    """
    lines = [f"{'pairs':10}{'picture':22}{'noun':>8}{'fill':>8}{'both':>8}   95 % interval"]
    for split, name in SPLITS.items():
        for choice, title in CHOICES.items():
            if f"{split}/{choice}/both" not in scores:
                continue
            noun, fill, both = (scores[f"{split}/{choice}/{w}"] for w in ("noun", "fill", "both"))
            low, high = wilson(both, prompts)
            lines.append(
                f"{name:10}{title.format(n=candidates):22}"
                f"{noun:8.1%}{fill:8.1%}{both:8.1%}   {low:.1%} to {high:.1%}"
            )
    return "\n".join(lines)


def grid(shown: Sequence[tuple[Image.Image, str, bool]], columns: int = 8) -> Image.Image:
    """Lay pictures out with the prompt under each, and a dot: green if right, red if wrong."""
    side, gap, caption = 128, 12, 20
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
        pen.text((x + 9, y + side + 4), text, fill="#333333", font=font)
    return sheet


def check_judge(judge: Judge, pictures: int, seed: int) -> Iterator[tuple[str, float]]:
    """Yield the judge's accuracy on real renderings, half of held-out pairs, half of training."""
    for split in SPLITS:
        # The seed is a phrase no training run uses, so the renderings are fresh.
        for name, share in accuracy(judge, split, pictures // 2, f"check {split} {seed}"):
            yield f"judge/{split}/{name}", share


def report_judge(scores: dict[str, float], pictures: int) -> None:
    """Print how often the judge is right, with a warning when that is not often enough."""
    for split, name in SPLITS.items():
        noun, fill, both = (scores[f"judge/{split}/{what}"] for what in ("noun", "fill", "both"))
        print(
            f"judge on {pictures // 2} real renderings of {name} pairs: "
            f"noun {noun:.1%}, fill {fill:.1%}, both {both:.1%}"
        )
        if both < TRUSTED:
            print(f"warning: the judge is below {TRUSTED:.0%}: trust it less", file=sys.stderr)


def details(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Give every prompt with every verdict, for the JSON."""
    return [
        {
            **asdict(answer.prompt),
            "best": answer.best,
            "seen": [f"{verdict.fill} {verdict.noun}" for verdict in answer.seen],
            "both": [answer.right(index)["both"] for index in range(len(answer.seen))],
        }
        for answer in answers
    ]
