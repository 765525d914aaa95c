"""Measure what a model draws, and what a dVAE leaves of pictures.

    python evaluate.py toybox --num-prompts 93 --num-candidates 16 --out runs/evaluation
    python evaluate.py dvae --model runs/dvae --data toybox --pictures 1000
    python evaluate.py judge --out dalle1/bundled/judge.safetensors --minutes 8

`toybox` asks the question of the paper's figure 2 (can the model join words it never saw
together?) with a count for an answer: prompts from held-out pairs beside as many from training
pairs, the best of N candidates by CLIP (section 2.6) beside the first candidate alone, looked at
by a small classifier that never reads the prompt. `judge` trains that classifier afresh. `dvae`
measures stage 1 on pictures that were set apart: likelihood, PSNR, its use of codes.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dalle1.cli import clear_errors

if TYPE_CHECKING:
    from PIL import Image

    from dalle1.judge import Judge, Verdict
    from dalle1.pipeline import DallE

SPLITS = {"heldout": "held-out", "train": "training"}
CHOICES = {"best": "best of {n} by CLIP", "first": "first candidate", "mean": "mean of {n}"}
TRUSTED = 0.98  # below this accuracy on real renderings the judge's word is not worth much
CHECK_PICTURES = 1000  # renderings on which a new judge is measured
STEPS_PER_MINUTE = 250  # on one core; a count of steps, not a clock, so that a run can be repeated


@dataclass(frozen=True, kw_only=True)
class ToyboxOptions:
    """Count how often the right noun and fill are drawn, on held-out and on training pairs."""

    model: str | None = None
    """Name or folder of the model; the bundled one if not given."""
    num_prompts: int = 93
    """Prompts from held-out pairs, each of another pair, and as many from training pairs."""
    num_candidates: int = 16
    """Pictures drawn for each prompt."""
    seed: int = 0
    """Chooses the prompts and the draws."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1, ..."""
    judge: Path | None = None
    """The judge's weights; the bundled ones if not given."""
    judge_pictures: int = 500
    """Real renderings on which the judge itself is checked first."""
    out: Path = Path("runs/toybox")
    """Folder for toybox.json and heldout.png."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.judge_pictures < 2:
            raise ValueError(f"judge_pictures must be at least 2, got {self.judge_pictures}")


@dataclass(frozen=True, kw_only=True)
class DVAEOptions:
    """Measure a dVAE on pictures that were set apart, and draw what is left of some."""

    model: Path
    """Folder of the dVAE."""
    data: str = "toybox"
    """Where the pictures come from, as in the trainings."""
    pictures: int = 1000
    """How many, at most."""
    temperature: float = 1 / 16
    """Of the relaxed codes."""
    allow_upscale: bool = False
    """Enlarge pictures that are too small; else they are left out."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    out: Path = Path("runs/dvae-evaluation")
    """Folder for dvae.json and reconstructions.png."""


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Train the judge afresh and measure it on renderings it has not seen."""

    out: Path
    """File to write, a .safetensors."""
    minutes: float = 8.0
    """How much to train: 250 steps for every minute, about what one core does."""
    seed: int = 0
    """Chooses the renderings, the first weights and the augmentation."""
    pictures: int = 9000
    """Renderings held in memory to learn from."""

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.pictures < 1:
            raise ValueError(
                f"minutes and pictures must be positive, got {self.minutes} and {self.pictures}"
            )


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
    from dalle1.data.toybox import FILLS, NOUNS, is_held_out
    from dalle1.data.toybox.captions import article

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


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share seen in `count` independent trials."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    half /= 1 + z * z / count
    return max(0.0, centre - half), min(1.0, centre + half)


def table(scores: dict[str, float], options: ToyboxOptions) -> str:
    """Lay the scores out, one row per split and choice, with an interval for both.

    Candidates of one prompt are not independent, so the interval of their mean counts prompts.
    """
    lines = [f"{'pairs':10}{'picture':22}{'noun':>8}{'fill':>8}{'both':>8}   95 % interval"]
    for split, name in SPLITS.items():
        for choice, title in CHOICES.items():
            if f"{split}/{choice}/both" not in scores:
                continue
            noun, fill, both = (scores[f"{split}/{choice}/{w}"] for w in ("noun", "fill", "both"))
            low, high = wilson(both, options.num_prompts)
            lines.append(
                f"{name:10}{title.format(n=options.num_candidates):22}"
                f"{noun:8.1%}{fill:8.1%}{both:8.1%}   {low:.1%} to {high:.1%}"
            )
    return "\n".join(lines)


def grid(shown: Sequence[tuple[Image.Image, str, bool]], columns: int = 8) -> Image.Image:
    """Lay pictures out with the prompt under each, and a dot: green if right, red if wrong."""
    from PIL import Image, ImageDraw, ImageFont

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
    from dalle1.judge import accuracy

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


def run_toybox(options: ToyboxOptions, model: DallE | None = None) -> dict[str, float]:
    """Run the whole evaluation, write its files and return the scores by name."""
    from tqdm import tqdm

    from dalle1.judge import BUNDLED, load_judge

    judge = load_judge(options.judge or BUNDLED)
    model = model or load_model(options)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: it may be refused
    scores = dict(check_judge(judge, options.judge_pictures, options.seed))
    report_judge(scores, options.judge_pictures)
    prompts = [p for s in SPLITS for p in choose_prompts(s, options.num_prompts, options.seed)]
    answers, shown = [], []
    for prompt in tqdm(prompts, desc="drawing", unit="prompt"):
        answer, picture = ask(model, judge, prompt, options.num_candidates)
        answers.append(answer)
        if prompt.split == "heldout":
            shown.append((picture, prompt.text, answer.right(answer.best or 0)["both"]))
    scores.update(toybox_scores(answers))
    write_report(options, scores, answers)
    grid(shown).save(options.out / "heldout.png")
    print(table(scores, options))
    if any(answer.best is None for answer in answers):
        print("the model has no CLIP, so there is no best of N", file=sys.stderr)
    print(f"wrote {options.out / 'toybox.json'} and {options.out / 'heldout.png'}")
    return scores


def load_model(options: ToyboxOptions) -> DallE:
    """Load the model to evaluate."""
    from dalle1 import DallE

    return DallE.from_pretrained(options.model, device=options.device)


def write_report(
    options: ToyboxOptions, scores: dict[str, float], answers: Sequence[Answer]
) -> None:
    """Write settings, scores, intervals and every verdict to toybox.json."""
    intervals = {
        name: wilson(share, options.num_prompts)
        for name, share in scores.items()
        if name.endswith("/both") and not name.startswith("judge/")
    }
    report: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "scores": scores,
        "intervals": intervals,
        "prompts": [
            {
                **asdict(answer.prompt),
                "best": answer.best,
                "seen": [f"{verdict.fill} {verdict.noun}" for verdict in answer.seen],
                "both": [answer.right(index)["both"] for index in range(len(answer.seen))],
            }
            for answer in answers
        ],
    }
    (options.out / "toybox.json").write_text(json.dumps(report, indent=1) + "\n")


def run_dvae(options: DVAEOptions) -> dict[str, float]:
    """Measure a dVAE, print and write the numbers and a picture, and return the numbers."""
    import torch

    from dalle1.data import open_source
    from dalle1.data.batches import first_examples
    from dalle1.data.images import centre_square, to_float, to_pil, to_tensor
    from dalle1.data.images import grid as sheet
    from dalle1.device import autocast, keep_freed_memory, pick_device
    from dvae import DVAE, evaluate

    if options.pictures < 1:
        raise ValueError(f"pictures is {options.pictures}, expected at least 1")
    device = pick_device(options.device)
    keep_freed_memory()
    model = DVAE.load(options.model, device)
    size = model.config.image_size

    def prepare(source: Any, index: int, _: random.Random) -> dict[str, torch.Tensor]:
        square = centre_square(source.image(index), size, options.allow_upscale)
        return {"images": to_tensor(square)}

    source = open_source(options.data, "validation", size, captions=False)
    images = to_float(first_examples(source, prepare, options.pictures)["images"]).to(device)
    with autocast(device, "bf16"):
        scores = evaluate(model, images, options.temperature)
        drawn = model.decode(model.encode(images[:16]))
    options.out.mkdir(parents=True, exist_ok=True)
    sheet(to_pil(torch.cat([images[:16], drawn])), 16).save(options.out / "reconstructions.png")
    (options.out / "dvae.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(f"{len(images)} pictures of {size} × {size}, a codebook of {model.vocab_size}")
    for name, value in scores.items():
        print(f"{name:14} {value:.4g}")
    print(f"wrote {options.out}")
    return scores


def run_judge(options: JudgeOptions) -> dict[str, float]:
    """Train a judge, measure it, write it and return its accuracy by name."""
    from dalle1.data.toybox import FILLS, NOUNS
    from dalle1.judge import JudgeConfig, accuracy, render_many, save_judge, train_judge

    options.out.parent.mkdir(parents=True, exist_ok=True)  # before the work: it may be refused
    config = JudgeConfig(nouns=tuple(NOUNS), fills=tuple(FILLS))
    data = render_many(config, options.pictures, "all", f"train {options.seed}")
    steps = max(1, round(options.minutes * STEPS_PER_MINUTE))
    judge = train_judge(config, data, steps=steps, seed=options.seed)
    save_judge(judge, options.out)
    scores = dict(check_judge(judge, CHECK_PICTURES, options.seed))
    report_judge(scores, CHECK_PICTURES)
    blurred = dict(accuracy(judge, "all", CHECK_PICTURES // 2, "blurred", degraded=True))
    scores.update({f"judge/degraded/{what}": share for what, share in blurred.items()})
    print(f"judge on {CHECK_PICTURES // 2} degraded renderings: both {blurred['both']:.1%}")
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run one evaluator."""
    command = (
        Annotated[ToyboxOptions, tyro.conf.subcommand("toybox")]
        | Annotated[DVAEOptions, tyro.conf.subcommand("dvae")]
        | Annotated[JudgeOptions, tyro.conf.subcommand("judge")]
    )
    with clear_errors():
        options = tyro.cli(command, args=arguments, description=__doc__)
        if isinstance(options, JudgeOptions):
            run_judge(options)
        elif isinstance(options, DVAEOptions):
            run_dvae(options)
        else:
            run_toybox(options)


if __name__ == "__main__":
    main()
