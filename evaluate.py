"""Measure what a model draws, what a CLIP knows, and what a dVAE leaves of pictures.

    python evaluate.py toybox --num-prompts 93 --num-candidates 16 --out runs/evaluation
    python evaluate.py samples --pictures outputs/a-red-star --reference toybox:1000
    python evaluate.py clip --clip runs/clip --data toybox
    python evaluate.py dvae --model runs/dvae --data toybox --pictures 1000
    python evaluate.py judge --out dalle1/bundled/judge.safetensors --minutes 8

`toybox` counts how often the right thing is drawn; `samples` measures any pictures, against their
prompts and against real ones; `clip` measures a CLIP itself. Each prints one table and writes one
JSON; what is measured is in dalle1/evaluation/. `judge` trains the classifier that `toybox` asks.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dalle1.cli import clear_errors, notes, parse

if TYPE_CHECKING:
    from dalle1.pipeline import DallE

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
    num_scenes: int = 0
    """Prompts with two or three things alike, and as many with two in a relation; all from training
    pairs."""
    scene_judge: Path | None = None
    """The weights of the judge of those; the bundled ones if not given."""
    out: Path = Path("runs/toybox")
    """Folder for toybox.json and heldout.png."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.judge_pictures < 2:
            raise ValueError(f"judge_pictures must be at least 2, got {self.judge_pictures}")
        if self.num_scenes < 0:
            raise ValueError(f"num_scenes must be 0 or more, got {self.num_scenes}")


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
    """Train the judge afresh and measure it on renderings it has not seen.

    Interrupted, the same command goes on."""

    out: Path
    """File to write, a .safetensors."""
    minutes: float = 8.0
    """How much to train: 250 steps for every minute, about what one core does."""
    seed: int = 0
    """Chooses the renderings, the first weights and the augmentation."""
    pictures: int = 9000
    """Renderings held in memory to learn from."""
    scenes: bool = False
    """Train the judge of whole scenes, which counts things and says where they are; it needs more
    pictures and more minutes."""

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.pictures < 1:
            raise ValueError(
                f"minutes and pictures must be positive, got {self.minutes} and {self.pictures}"
            )


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """Measure a CLIP: zero-shot classes, retrieval, a linear probe, and what belongs to what."""

    clip: str = "bundled"
    """Folder or Hugging Face name of a CLIP or SigLIP, or bundled."""
    data: str = "toybox"
    """toybox, or your own: a folder with a folder of pictures for each class (zero-shot, linear
    probe), pictures beside .txt captions (retrieval) and beside .foil.txt ones, which have the
    same words and are wrong (binding); or WebDataset shards (retrieval)."""
    templates: tuple[str, ...] = ()
    """Captions of a class, {} for its name; the paper's seven best if none are given."""
    pictures: int = 400
    """Of Toybox for each probe; of other data at most, 0 for all."""
    seed: int = 0
    """Chooses Toybox's scenes."""
    device: str = "auto"
    """auto is cuda, else mps, else cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What matrix products are computed in."""
    out: Path = Path("runs/clip-evaluation")
    """Folder for clip.json."""

    def __post_init__(self) -> None:
        least = 4 if self.data == "toybox" else 0
        if self.pictures < least:
            raise ValueError(f"pictures is {self.pictures}, expected at least {least}")


@dataclass(frozen=True, kw_only=True)
class SamplesOptions:
    """Measure drawn pictures against their prompts, and against real pictures."""

    pictures: Path
    """Folder of the pictures. Their prompts: in name.txt beside each, or in the PNG itself, where
    sample.py puts them; without any, only the distances are measured."""
    reference: str | None = None
    """Real pictures: toybox:N, a folder or WebDataset shards. None: only the prompts count."""
    clip: str = "bundled"
    """Folder or Hugging Face name of a CLIP or SigLIP, or bundled."""
    blur: tuple[float, ...] = (0, 1, 2, 4, 8)
    """Radii, in pixels of pictures 256 wide, by which both sides are blurred; the paper's."""
    most: int = 30_000
    """Pictures of each side, at most; the paper's FID is of 30,000."""
    inception: bool = False
    """FID and Inception Score, too: needs torchmetrics, torch-fidelity and their weights."""
    device: str = "auto"
    """auto is cuda, else mps, else cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What matrix products are computed in."""
    out: Path = Path("runs/samples-evaluation")
    """Folder for samples.json."""

    def __post_init__(self) -> None:
        if not self.blur or min(self.blur) < 0:
            raise ValueError(f"blur is {self.blur}, expected radii of 0 or more")
        if self.most < 2:
            raise ValueError(f"most is {self.most}, expected at least 2")
        if self.inception and self.reference is None:
            raise ValueError("inception compares with real pictures: name them by --reference")


def run_toybox(options: ToyboxOptions, model: DallE | None = None) -> dict[str, float]:
    """Run the whole evaluation, write its files and return the scores by name."""
    from tqdm import tqdm

    from dalle1.evaluation.report import table, wilson, write_report
    from dalle1.evaluation.toybox import (
        SPLITS,
        ask,
        check_judge,
        choose_prompts,
        details,
        grid,
        report_judge,
        toybox_scores,
        toybox_table,
    )
    from dalle1.judge import BUNDLED, load_judge

    # All that may be refused comes before the work.
    judge = load_judge(options.judge or BUNDLED)
    prompts = [p for s in SPLITS for p in choose_prompts(s, options.num_prompts, options.seed)]
    ask_scenes = scenes_asked(options) if options.num_scenes else None
    model = model or load_model(options)
    options.out.mkdir(parents=True, exist_ok=True)
    scores = dict(check_judge(judge, options.judge_pictures, options.seed))
    report_judge(scores, options.judge_pictures)
    answers, shown = [], []
    for prompt in tqdm(prompts, desc="drawing", unit="prompt"):
        answer, picture = ask(model, judge, prompt, options.num_candidates)
        answers.append(answer)
        if prompt.split == "heldout":
            shown.append((picture, prompt.text, answer.right(answer.best or 0)["both"]))
    scores.update(toybox_scores(answers))
    if ask_scenes:
        scores.update(ask_scenes(model))
    intervals = {
        name: wilson(share, options.num_prompts)
        for name, share in scores.items()
        if name.endswith("/both") and not name.startswith("judge/")
    }
    path = options.out / "toybox.json"
    write_report(path, options, scores, intervals=intervals, prompts=details(answers))
    grid(shown).save(options.out / "heldout.png")
    print(toybox_table(scores, options.num_prompts, options.num_candidates))
    if ask_scenes:
        print(table((k, v) for k, v in scores.items() if k.startswith(("count", "relation"))))
    if any(answer.best is None for answer in answers):
        print("the model has no CLIP, so there is no best of N", file=sys.stderr)
    print(f"wrote {path} and {options.out / 'heldout.png'}")
    return scores


def scenes_asked(options: ToyboxOptions) -> Callable[[DallE], dict[str, float]]:
    """Load the judge of counts and relations and choose prompts; what is given draws them.

    It checks the judge, draws, has the pictures judged, and gives the shares by name.
    """
    from tqdm import tqdm

    from dalle1.evaluation import scenes
    from dalle1.scene_judge import BUNDLED, load_scene_judge

    judge = load_scene_judge(options.scene_judge or BUNDLED)
    asked = {k: scenes.choose_scenes(k, options.num_scenes, options.seed) for k in scenes.KINDS}

    def ask(model: DallE) -> dict[str, float]:
        scores = dict(scenes.check_scene_judge(judge, options.judge_pictures, options.seed))
        scenes.report_scene_judge(scores, options.judge_pictures)
        for kind, prompts in asked.items():
            answers = [
                scenes.ask(model, judge, prompt, options.num_candidates)
                for prompt in tqdm(prompts, desc=f"drawing {kind}s", unit="prompt")
            ]
            scores.update(scenes.scene_scores(kind, answers))
        return scores

    return ask


def load_model(options: ToyboxOptions) -> DallE:
    """Load the model to evaluate."""
    from dalle1 import DallE

    return DallE.from_pretrained(options.model, device=options.device)


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


def run_clip(options: ClipOptions) -> dict[str, float]:
    """Measure a CLIP, print and write the numbers, and return them."""
    from dalle1.clip import Clip
    from dalle1.device import pick_device
    from dalle1.evaluation.clips import TEMPLATES
    from dalle1.evaluation.own import folder_probes
    from dalle1.evaluation.report import table, write_report
    from dalle1.evaluation.toybox_probes import toybox_probes

    clip = Clip.from_pretrained(options.clip, pick_device(options.device), options.precision)
    if options.data == "toybox":
        if options.templates:
            raise ValueError("templates are for classes of your own; Toybox's captions are fixed")
        found = toybox_probes(clip, options.pictures, options.seed)
    else:
        templates = options.templates or TEMPLATES
        found = folder_probes(clip, options.data, templates, options.pictures or None)
    scores = dict(found)
    write_report(options.out / "clip.json", options, scores)
    print(table(scores.items()))
    print(f"wrote {options.out / 'clip.json'}")
    return scores


def run_samples(options: SamplesOptions) -> dict[str, float]:
    """Measure drawn pictures, print and write the numbers, and return them."""
    from dalle1.clip import Clip
    from dalle1.data import open_source
    from dalle1.data.reading import AS_IT_IS
    from dalle1.data.streams import Streamed
    from dalle1.device import pick_device
    from dalle1.evaluation.own import drawn_pictures, prompt_of
    from dalle1.evaluation.report import table, write_report
    from dalle1.evaluation.samples import Pictures, clip_score, distances, features, inception

    device = pick_device(options.device)
    clip = Clip.from_pretrained(options.clip, device, options.precision)
    source = drawn_pictures(options.pictures)
    drawn = Pictures(source, options.most)
    scores: dict[str, float] = {"pictures": len(drawn)}
    prompts = [prompt_of(path) for path in source.pictures[: len(drawn)]]
    prompted = [i for i, prompt in enumerate(prompts) if prompt]
    if prompted:
        texts = clip.embed_text([str(prompts[i]) for i in prompted])
        scores |= clip_score(features(clip, drawn)[prompted], texts)
    elif options.reference is None:
        raise ValueError(
            f"the pictures in {options.pictures} have no prompts, and there is no --reference: "
            "nothing to measure them by"
        )
    if options.reference is not None:
        whole = open_source(options.reference, "encode", captions=False, reading=AS_IT_IS)
        if isinstance(whole, Streamed):
            raise ValueError(
                f"{options.reference} can only be read front to back: give fewer shards"
            )
        real = Pictures(whole, options.most)
        scores |= {
            "reference pictures": len(real),
            **dict(distances(clip, drawn, real, options.blur)),
        }
        if options.inception:
            scores |= inception(drawn, real, options.blur, device=device)
    write_report(options.out / "samples.json", options, scores)
    print(table(scores.items()))
    print(f"wrote {options.out / 'samples.json'}")
    return scores


def run_judge(options: JudgeOptions) -> dict[str, float]:
    """Train a judge, measure it, write it and return its accuracy by name."""
    from dalle1.data.toybox import FILLS, NOUNS
    from dalle1.evaluation.toybox import check_judge, report_judge
    from dalle1.judge import JudgeConfig, accuracy, render_many, save_judge, train_judge

    options.out.parent.mkdir(parents=True, exist_ok=True)  # before the work: it may be refused
    config = JudgeConfig(nouns=tuple(NOUNS), fills=tuple(FILLS))
    steps = max(1, round(options.minutes * STEPS_PER_MINUTE))
    how: dict[str, Any] = {"steps": steps, "seed": options.seed}
    how["kept"] = options.out.with_name(f".{options.out.name}.training")
    if options.scenes:
        from dalle1.evaluation.report import table
        from dalle1.evaluation.scenes import check_scene_judge
        from dalle1.scene_judge import train_scene_judge

        seen = train_scene_judge(config, pictures=options.pictures, **how)
        save_judge(seen, options.out)
        scores = dict(check_scene_judge(seen, CHECK_PICTURES, options.seed))
        print(f"{table(scores.items())}\nwrote {options.out}")
        return scores
    data = render_many(config, options.pictures, "all", f"train {options.seed}")
    judge = train_judge(config, data, **how)
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
        | Annotated[SamplesOptions, tyro.conf.subcommand("samples")]
        | Annotated[ClipOptions, tyro.conf.subcommand("clip")]
        | Annotated[DVAEOptions, tyro.conf.subcommand("dvae")]
        | Annotated[JudgeOptions, tyro.conf.subcommand("judge")]
    )
    with clear_errors(), notes():
        options = parse(command, arguments, __doc__)
        runs: dict[type, Any] = {
            ToyboxOptions: run_toybox,
            SamplesOptions: run_samples,
            ClipOptions: run_clip,
            DVAEOptions: run_dvae,
            JudgeOptions: run_judge,
        }
        runs[type(options)](options)


if __name__ == "__main__":
    main()
