"""How often a model's samples show what a Toybox prompt asks for.

This is the question of the paper's figure 2: can the model combine words that it never saw
together? Half of the prompts use held-out pairs, half use training pairs; they ask for single
objects, two kinds in a relation, counted objects and styles. A classifier that never reads the
prompt checks the best of N candidates by CLIP (section 2.6), for several N of the same candidates.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

from dalle1.console import bar
from dalle1.data.images import grid, save_png
from dalle1.devices import pick_device
from dalle1.evaluation.classifier import (
    ASPECTS,
    BUNDLED,
    ToyboxClassifier,
    Verdict,
    load_classifier,
)
from dalle1.evaluation.classifier_accuracy import classifier_accuracy, print_accuracy
from dalle1.evaluation.report import Scores, wilson_interval
from dalle1.evaluation.toybox_prompts import KINDS, SPLITS, Prompt, PromptBatch, prompt_batches
from dalle1.sampling.generation import GenerationConfig, Rerank
from dalle1.sampling.ranking import RankingPipeline
from dalle1.storage import write_atomic
from dalle2.loading import load_pipeline

PROMPTS, HELD_OUT = "prompts.json", "heldout.png"
MAX_SHOWN = 96  # images in heldout.png
NUM_PROMPTS = "/prompts"
"""Suffix of the number of prompts that a share is computed from."""


@dataclass(frozen=True, kw_only=True)
class ToyboxOptions:
    """Measure how often samples show what their Toybox prompts ask for."""

    model: str | None = None
    """Name or folder of the model; the bundled model by default."""
    best_of: tuple[int, ...] = (1, 16, 64)
    """Numbers of candidates from which CLIP selects the best image."""
    num_prompts: tuple[int, ...] = (200, 50, 12)
    """Prompts of held-out pairs for each number in --best-of, and as many of training pairs. A
    shorter list of prompts is the beginning of a longer one. The defaults generate 3,052 images."""
    seed: int = 0
    """Random seed of the prompts and of sampling."""
    temperature: float | None = None
    """Sampling temperature; by default the model's own (generation.json), else 1."""
    top_p: float | None = None
    """Nucleus sampling: keep the most likely codes with this total probability. 1 keeps all; by
    default the model's own, else 1."""
    guidance: float | None = None
    """Classifier-free guidance scale. Above 1, samples follow the prompt more closely and take
    up to twice the time. By default the model's own, else 1."""
    rerank: Rerank | None = None
    """Order of the candidates: clip, likelihood or none; by default the model's own."""
    device: str = "auto"
    """Device that runs the model: auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the transformer. auto is bf16 where the hardware supports it."""
    classifier: Path | None = None
    """File or training folder of the Toybox classifier; the bundled classifier by default."""
    classifier_images: int = 1000
    """Renderings on which the classifier's own accuracy is measured first."""
    out: Path = Path("runs/toybox")
    """Folder for toybox.json, prompts.json and heldout.png."""

    def __post_init__(self) -> None:
        if len(self.num_prompts) != len(self.best_of) or not self.best_of:
            raise ValueError(
                f"num_prompts is {self.num_prompts} and best_of {self.best_of}, expected one "
                "number of prompts for each number of candidates"
            )
        for name in ("num_prompts", "best_of"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected numbers of at least 1")
        if self.classifier_images < 2:
            raise ValueError(f"classifier_images is {self.classifier_images}, expected at least 2")


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """Verdicts on all candidates of one prompt, by candidate index.

    Of candidates that are all alike, as at temperature 0, there is only the first.
    """

    prompt: Prompt
    seed: int
    num_candidates: int
    verdicts: list[Verdict]
    scores: list[float] | None
    """The reranker's score of each candidate; None without one."""
    best_image: Image.Image

    def best(self, count: int) -> int:
        """Return the index of the best of the first `count` candidates; unranked, the first."""
        scores = self.scores or [0.0] * len(self.verdicts)
        return max(range(min(count, len(self.verdicts))), key=lambda index: (scores[index], -index))

    def compare_best(self, count: int) -> dict[str, bool | None]:
        """Return which aspects are correct in the best of the first `count` candidates."""
        return self.verdicts[self.best(count)].compare(self.prompt.scene)


def evaluate_toybox(options: ToyboxOptions, model: RankingPipeline | None = None) -> Scores:
    """Yield the classifier's accuracy, then the shares of correct samples; see `toybox_shares`.

    Writes prompts.json, with the verdict on every sample, and heldout.png, a grid of samples.
    """
    # Everything that can be refused comes before the work.
    names = "temperature", "top_p", "guidance", "rerank"
    sampling = {name: getattr(options, name) for name in names}
    GenerationConfig().updated(**sampling)
    classifier = load_classifier(options.classifier or BUNDLED, pick_device(options.device))
    batches = list(prompt_batches(options.num_prompts, options.best_of, options.seed))
    if model is None:
        model = load_pipeline(options.model, device=options.device, precision=options.precision)
    size = model.image_tokenizer.image_size
    accuracy = dict(classifier_accuracy(classifier, options.classifier_images, options.seed, size))
    print_accuracy(accuracy, options.classifier_images)
    yield from accuracy.items()
    results: list[PromptResult] = []
    total = sum(len(batch.prompts) * batch.num_candidates for batch in batches)
    with bar(total=total, unit="image") as progress:
        for batch in batches:
            for result in sample_and_classify(model, classifier, batch, sampling):
                results.append(result)
                progress.update(batch.num_candidates)
    write_atomic(options.out / PROMPTS, json.dumps(list(map(details, results)), indent=1))
    tiles = [result_tile(result) for result in results if result.prompt.split == "heldout"]
    save_png(grid(tiles[:MAX_SHOWN], min(8, len(tiles))), options.out / HELD_OUT)
    if any(result.scores is None for result in results):
        print(
            "note: the model has no CLIP, so best of N needs N = 1, or --rerank likelihood",
            file=sys.stderr,
        )
    yield from toybox_shares(results, sorted(options.best_of))


def sample_and_classify(
    model: RankingPipeline,
    classifier: ToyboxClassifier,
    batch: PromptBatch,
    sampling: Mapping[str, Any],
) -> Iterator[PromptResult]:
    """Generate the candidates of some prompts, and yield the verdicts on them."""
    ranked = model.sample(
        [prompt.text for prompt in batch.prompts],
        num_candidates=batch.num_candidates,
        seed=batch.seed,
        **sampling,
    )
    for prompt, best_first in zip(batch.prompts, ranked, strict=True):
        candidates = sorted(best_first, key=lambda candidate: candidate.index)
        scores = [c.score for c in candidates if c.score is not None]
        yield PromptResult(
            prompt=prompt,
            seed=batch.seed,
            num_candidates=batch.num_candidates,
            verdicts=classifier.classify([candidate.image for candidate in candidates]),
            scores=scores or None,
            best_image=best_first[0].image,
        )


def toybox_shares(results: Sequence[PromptResult], best_of: Sequence[int]) -> Scores:
    """Yield `SPLIT/KIND/best of N/ASPECT`, the share of correct images, and its number of prompts.

    The kind `all` includes every prompt with N candidates. The kind `same` includes only prompts
    with the most candidates, so that its rows compare. Without a reranker, only N = 1 is measured.
    """
    for split in SPLITS:
        of_split = [result for result in results if result.prompt.split == split]
        for kind in ("all", *KINDS, "same"):
            of_kind = [r for r in of_split if kind in ("all", r.prompt.kind)]
            if kind == "same":
                of_kind = [r for r in of_split if r.num_candidates >= max(best_of)]
            for n in best_of:
                group = [r for r in of_kind if r.num_candidates >= n and (n == 1 or r.scores)]
                compared = [result.compare_best(n) for result in group]
                for aspect in ASPECTS:
                    correct = [bool(x[aspect]) for x in compared if x[aspect] is not None]
                    if correct:
                        name = f"{split}/{kind}/best of {n}/{aspect}"
                        yield name, sum(correct) / len(correct)
                        yield f"{name}{NUM_PROMPTS}", len(correct)


def format_toybox_table(scores: Mapping[str, float]) -> str:
    """Return the shares as a table: a row for each split, kind and N, an interval for "all"."""
    head = "".join(f"{aspect:>9}" for aspect in ASPECTS)
    lines = [f"{'pairs':10}{'kind':7}{'image':12}{'prompts':>8}{head}   95 % interval"]
    names = [name for name in scores if name.partition("/")[0] in SPLITS]
    rows = dict.fromkeys("/".join(name.split("/")[:3]) for name in names)
    for row in rows:
        split, kind, image = row.split("/")
        shares = [scores.get(f"{row}/{aspect}") for aspect in ASPECTS]
        cells = "".join(f"{share:9.1%}" if share is not None else f"{'':9}" for share in shares)
        count = int(scores[f"{row}/all{NUM_PROMPTS}"])
        low, high = wilson_interval(scores[f"{row}/all"], count)
        lines.append(
            f"{SPLITS[split]:10}{kind:7}{image:12}{count:8}{cells}   {low:.1%} to {high:.1%}"
        )
    lines.append(
        "More candidates take longer, so fewer prompts have them (--num-prompts).\n"
        "Compare numbers of candidates by the rows of `same`, which use the same prompts."
    )
    return "\n".join(lines)


def result_tile(result: PromptResult, side: int = 128) -> Image.Image:
    """Return the best image over its prompt, with a dot: green if all is correct, else red."""
    tile = Image.new("RGB", (side, side + 32), "white")
    tile.paste(result.best_image.resize((side, side)))
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(9)
    correct = result.compare_best(len(result.verdicts))["all"]
    pen.ellipse((0, side + 7, 5, side + 12), fill="#3a9d5d" if correct else "#c8553d")
    lines = textwrap.fill(result.prompt.text, 24)
    pen.multiline_text((9, side + 4), lines, fill="#333333", font=font, spacing=2)
    return tile


def details(result: PromptResult) -> dict[str, Any]:
    """Return a prompt and the verdicts on all its candidates, for prompts.json."""
    scene = result.prompt.scene
    return {
        "text": result.prompt.text,
        "kind": result.prompt.kind,
        "split": result.prompt.split,
        "seed": result.seed,
        "best": result.best(len(result.verdicts)),
        "verdicts": [describe_verdict(verdict) for verdict in result.verdicts],
        "correct": [verdict.compare(scene)["all"] for verdict in result.verdicts],
    }


def describe_verdict(verdict: Verdict) -> str:
    """Return a verdict in a few words."""
    things = " and ".join(
        f"{count} {fill} {noun}" if count != 1 else f"{fill} {noun}"
        for (fill, noun), count in zip(verdict.things, verdict.counts or (1,))
    )
    return f"{verdict.style}, {verdict.layout}: {things}"
