"""Measure what a model draws, what a CLIP knows, and what a dVAE leaves of pictures.

    python evaluate.py toybox --best-of 1 16 64 --num-prompts 200 50 12 --out runs/evaluation
    python evaluate.py samples --pictures outputs/a-red-star --reference toybox:1000
    python evaluate.py clip --clip runs/clip --data toybox
    python evaluate.py dvae --model runs/dvae --data toybox --pictures 1000
    python evaluate.py judge --out dalle1/bundled/toybox/classifier.safetensors

`toybox` counts how often the right thing is drawn; `samples` measures any pictures, against their
prompts and against real ones; `clip` measures a CLIP itself. Each prints one table and writes one
JSON; what is measured is in dalle1/evaluation/. `judge` trains the classifier that `toybox` asks.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dalle1.console import notes, one_line_errors, parse

if TYPE_CHECKING:
    from PIL.Image import Image

    from dalle1.pipeline import DallE


@dataclass(frozen=True, kw_only=True)
class ToyboxOptions:
    """Count how often the right things are drawn, on held-out and on training pairs."""

    model: str | None = None
    """Name or folder of the model; the bundled one if not given."""
    best_of: tuple[int, ...] = (1, 16, 64)
    """Candidates of which CLIP takes the best; the same for all of these."""
    num_prompts: tuple[int, ...] = (200, 50, 12)
    """Prompts from held-out pairs for each of them, and as many from training pairs: of one thing,
    of two kinds in a relation, of things alike, in styles. The few for many candidates are the
    first of the many, and keep the time within bounds: 3,052 pictures by default."""
    seed: int = 0
    """Chooses the prompts and the draws."""
    temperature: float = 1.0
    """Of the draws, as in sample.py; so are the next two."""
    top_p: float = 1.0
    """Only the likeliest codes that make up this share of the probability; 1: all."""
    guidance: float = 1.0
    """Above 1: closer to the prompt, in twice the time."""
    device: str = "auto"
    """Where the model runs: auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the transformer; auto is bf16 where the processor has it."""
    judge: Path | None = None
    """The judge's weights; the bundled ones if not given."""
    judge_pictures: int = 1000
    """Real renderings on which the judge itself is checked first."""
    out: Path = Path("runs/toybox")
    """Folder for toybox.json and heldout.png."""

    def __post_init__(self) -> None:
        if len(self.num_prompts) != len(self.best_of) or not self.best_of:
            raise ValueError(
                f"num_prompts is {self.num_prompts} and best_of {self.best_of}, expected one "
                "number of prompts for each number of candidates"
            )
        for name in ("num_prompts", "best_of"):
            if min(getattr(self, name)) < 1:
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
    """Train the judge afresh and measure it on renderings it has not seen.

    Interrupted, the same command goes on."""

    out: Path
    """File to write, a .safetensors."""
    steps: int = 5000
    """Updates of 64 pictures; half an hour of one core."""
    seed: int = 0
    """Chooses the renderings, the first weights and the augmentation."""
    pictures: int = 40_000
    """Renderings held in memory to learn from: 49 kB each."""
    check_pictures: int = 1000
    """Other renderings, on which it is measured then."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("pictures", 1), ("check_pictures", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


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

    from dalle1 import DallE
    from dalle1.evaluation import toybox
    from dalle1.evaluation.classifier import BUNDLED, load_judge
    from dalle1.evaluation.report import write_report
    from dalle1.sampling.decoding import Sampling

    # All that may be refused comes before the work.
    named = {name: getattr(options, name) for name in ("temperature", "top_p", "guidance")}
    sampling = Sampling(**named)
    judge = load_judge(options.judge or BUNDLED)
    batches = list(toybox.batches_of(options.num_prompts, options.best_of, options.seed))
    if model is None:
        how = {"device": options.device, "precision": options.precision}
        model = DallE.from_pretrained(options.model, **how)
    options.out.mkdir(parents=True, exist_ok=True)
    size = model.image_tokenizer.image_size
    scores = dict(toybox.check_judge(judge, options.judge_pictures, options.seed, size))
    toybox.report_judge(scores, options.judge_pictures)
    answers: list[toybox.Answer] = []
    shown: list[tuple[Image, str, bool]] = []
    with tqdm(
        total=sum(len(prompts) * count for prompts, count, _ in batches), unit="picture"
    ) as progress:
        for prompts, count, seed in batches:
            for answer, picture in toybox.ask(model, judge, prompts, count, seed, sampling):
                answers.append(answer)
                progress.update(count)
                if answer.prompt.split == "heldout" and len(shown) < 96:
                    shown.append((picture, answer.prompt.text, bool(answer.right(count)["all"])))
    shares = toybox.toybox_shares(answers, sorted(options.best_of))
    scores.update({name: part.share for name, part in shares.items()})
    path = options.out / "toybox.json"
    counted = {
        name: {"prompts": part.count, "interval": part.interval} for name, part in shares.items()
    }
    write_report(path, options, scores, counted=counted, prompts=toybox.details(answers))
    toybox.grid(shown).save(options.out / "heldout.png")
    print(toybox.toybox_table(shares))
    print(
        "The more candidates, the fewer prompts, to bound the time (--num-prompts sets how many);"
    )
    print("the rows of `same` are of those prompts that have all candidates, so that they compare.")
    if any(answer.scores is None for answer in answers):
        print("the model has no CLIP, so there is no best of N", file=sys.stderr)
    print(f"wrote {path} and {options.out / 'heldout.png'}")
    return scores


def run_dvae(options: DVAEOptions) -> dict[str, float]:
    """Measure a dVAE, print and write the numbers and a picture, and return the numbers."""
    import torch

    from dalle1.data import open_source
    from dalle1.data.images import centre_square, to_float, to_pil, to_tensor
    from dalle1.data.images import grid as sheet
    from dalle1.data.loader import first_examples
    from dalle1.devices import autocast, keep_freed_memory, pick_device
    from dalle1.evaluation.reconstruction import reconstruction_metrics
    from dvae import DVAE

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
        scores = dict(reconstruction_metrics(model, images, options.temperature))
        drawn = model.decode(model.encode(images[:16]))
    options.out.mkdir(parents=True, exist_ok=True)
    sheet(to_pil(torch.cat([images[:16], drawn])), 16).save(options.out / "reconstructions.png")
    (options.out / "dvae.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(f"{len(images)} pictures of {size} × {size}, a codebook of {model.codebook_size}")
    for name, value in scores.items():
        print(f"{name:14} {value:.4g}")
    print(f"wrote {options.out}")
    return scores


def run_clip(options: ClipOptions) -> dict[str, float]:
    """Measure a CLIP, print and write the numbers, and return them."""
    from dalle1.clip import Clip
    from dalle1.devices import pick_device
    from dalle1.evaluation.clip_metrics import TEMPLATES
    from dalle1.evaluation.folder_benchmarks import folder_probes
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
    from dalle1.data.cleaning import NO_CLEANING
    from dalle1.data.sources.streaming_shards import StreamingShards
    from dalle1.devices import pick_device
    from dalle1.evaluation.folder_benchmarks import drawn_pictures, prompt_of
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
        whole = open_source(options.reference, "encode", captions=False, reading=NO_CLEANING)
        if isinstance(whole, StreamingShards):
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
    from dalle1.evaluation.classifier import JudgeConfig, save_judge
    from dalle1.evaluation.classifier_training import (
        accuracy,
        mixed_scenes,
        render_many,
        train_judge,
    )
    from dalle1.evaluation.toybox import check_judge, report_judge
    from dalle1.toybox.kinds import scenes

    options.out.parent.mkdir(parents=True, exist_ok=True)  # before the work: it may be refused
    config = JudgeConfig()
    data = render_many(config, options.pictures, mixed_scenes("all", f"train {options.seed}"))
    kept = options.out.with_name(f".{options.out.name}.training")
    judge = train_judge(config, data, steps=options.steps, seed=options.seed, kept=kept)
    save_judge(judge, options.out)
    scores = dict(check_judge(judge, options.check_pictures, options.seed))
    report_judge(scores, options.check_pictures)
    half = options.check_pictures // 2
    blurred = dict(accuracy(judge, scenes("all", "blurred"), half, degraded=True))
    scores.update({f"judge/degraded/{what}": share for what, share in blurred.items()})
    shares = ", ".join(f"{what} {share:.1%}" for what, share in blurred.items())
    print(f"judge on {half} degraded renderings: {shares}")
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
    with one_line_errors(), notes():
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
