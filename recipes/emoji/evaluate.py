"""Measure how often samples show the concept and the artist of their prompts.

    recipes/emoji/train.sh    # trains model and classifier, then runs this

Half of the prompts are held-out pairs: this concept by this artist was never trained on, but its
true image exists. A classifier of real images states what each sample shows (classifier.py).
`distance` is the perceptual distance of a sample to the true image; `of nearest` that of the true
image to the nearest of the same concept by another artist; `closest` the share of samples that are
closer to the true image than to every other artist's.
"""

from __future__ import annotations

import random
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from classifier import Emoji, EmojiClassifier, accuracy, load_classifier
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dalle1.console import bar, notes, one_line_errors, parse
from dalle1.data.images import grid, to_float, to_pil, to_tensor
from dalle1.evaluation.report import Scores, wilson_interval, write_report
from dalle1.pipeline import DallE
from dalle1.sampling.generation import Rerank

PARTS = ("concept", "artist", "both")
MAX_SHOWN = 24  # held-out pairs in heldout.png


@dataclass(frozen=True, kw_only=True)
class EmojiOptions:
    """Measure how often samples show the concept and the artist of their prompts."""

    model: str = "runs/emoji-model/model"
    """Folder of the model."""
    clip: str | None = None
    """Folder of the CLIP that reranks; by default the one in the model's folder."""
    rerank: Rerank | None = None
    """Reranker: clip, likelihood or none; by default the model's own."""
    data: Path = Path("runs/emoji")
    """Folder that emoji.py wrote."""
    classifier: Path = Path("runs/emoji-model/classifier")
    """Folder of the classifier's training."""
    num_prompts: int = 100
    """Prompts of held-out pairs, and as many of training pairs."""
    best_of: int = 16
    """Number of candidates, of which the reranker selects the best."""
    seed: int = 0
    """Random seed of the choice of prompts and of sampling."""
    temperature: float | None = None
    """Sampling temperature; by default the model's own."""
    top_p: float | None = None
    """Nucleus sampling: keep the most likely codes with this total probability. 1 keeps
    all; by default the model's own."""
    guidance: float | None = None
    """Classifier-free guidance scale; by default the model's own."""
    device: str = "auto"
    """Device that runs the model: auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the transformer."""
    out: Path = Path("runs/emoji-model/evaluation")
    """Folder for emoji.json and heldout.png."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "best_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Verdict:
    """What is right about one sample, and its distances."""

    concept: bool
    artist: bool
    distance: float
    to_others: float  # the sample to the nearest image of its concept by another artist
    of_nearest: float  # the true image to the nearest image of its concept by another artist


def verdicts_on(
    classifier: EmojiClassifier, emoji: Emoji, index: int, images: Sequence[Image.Image]
) -> Iterator[Verdict]:
    """Yield the verdict on each sample for the pair `index`."""
    concept, artist = emoji.concepts[index], emoji.artists[index]
    pixels = torch.stack([to_tensor(image) for image in images])
    true = emoji.images[index][None]
    others = [i for i, name in enumerate(emoji.concepts) if name == concept and i != index]
    references = emoji.images[others]

    def nearest(image: Tensor) -> float:
        near = classifier.distance(image.expand(len(references), -1, -1, -1), references)
        return float(near.min())

    of_nearest = nearest(true)
    for image, found in zip(pixels, classifier.classify(pixels), strict=True):
        distance = float(classifier.distance(image[None], true))
        right = found[0] == concept, found[1] == artist
        yield Verdict(*right, distance, nearest(image[None]), of_nearest)


def evaluate_emoji(options: EmojiOptions) -> Scores:
    """Yield the classifier's accuracy on reconstructions, then `SPLIT/IMAGE/SCORE`.

    IMAGE is first, best of N, or an artist, for the best candidates of that artist's pairs.
    """
    classifier, emoji = load_classifier(options.classifier), Emoji.read(options.data)
    model = DallE.from_pretrained(
        options.model, clip=options.clip, device=options.device, precision=options.precision
    )
    shown: list[Image.Image] = []
    for split, held_out in (("heldout", True), ("train", False)):
        chosen = [i for i in emoji.where(held_out) if emoji.concepts.count(emoji.concepts[i]) > 1]
        random.Random(options.seed).shuffle(chosen)
        chosen = chosen[: options.num_prompts]
        again = reconstructed(model, emoji.images[chosen])
        yield f"{split}/reconstructions/prompts", len(chosen)
        for name, value in accuracy(classifier, emoji, again, chosen, "reconstructions"):
            yield f"{split}/{name.replace('_', '/')}", value
        first, best = [], []
        for index, verdicts, image in samples(options, model, classifier, emoji, chosen):
            first.append(verdicts[0])
            best.append(verdicts[-1])
            if held_out and len(shown) < MAX_SHOWN:
                true = to_pil(to_float(emoji.images[index][None]))[0]
                shown.append(tile(true, image, prompt_of(emoji, index)))
        yield from shares(f"{split}/first", first)
        yield from shares(f"{split}/best of {options.best_of}", best)
        for artist in sorted(set(emoji.artists)):
            of_artist = [v for i, v in zip(chosen, best) if emoji.artists[i] == artist]
            yield from shares(f"{split}/{artist}", of_artist)
    grid(shown, 6).save(options.out / "heldout.png")


def prompt_of(emoji: Emoji, index: int) -> str:
    """Return the caption of pair `index` that has the concept's name alone."""
    return f"{emoji.concepts[index]}, {emoji.artists[index]} style"


def tile(true: Image.Image, sample: Image.Image, prompt: str, side: int = 88) -> Image.Image:
    """Return the true image beside a sample, over the prompt."""
    sheet = Image.new("RGB", (2 * side + 4, side + 32), "white")
    for left, image in ((0, true), (side + 4, sample)):
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, 0))
    plain = unicodedata.normalize("NFKD", prompt).replace("’", "'").encode("ascii", "ignore")
    text = "\n".join(textwrap.wrap(plain.decode(), 30, max_lines=2, placeholder=" ..."))
    style = {"fill": "#333", "font": ImageFont.load_default(11), "anchor": "ma", "align": "center"}
    ImageDraw.Draw(sheet).multiline_text((side + 2, side + 3), text, **style)
    return sheet


def samples(
    options: EmojiOptions,
    model: DallE,
    classifier: EmojiClassifier,
    emoji: Emoji,
    chosen: Sequence[int],
) -> Iterator[tuple[int, list[Verdict], Image.Image]]:
    """Yield each pair with the verdicts on its first and its best candidate, and the best image."""
    prompts = [prompt_of(emoji, i) for i in chosen]
    ranked = model.sample(
        prompts,
        num_candidates=options.best_of,
        seed=options.seed,
        rerank=options.rerank,
        temperature=options.temperature,
        top_p=options.top_p,
        guidance=options.guidance,
    )
    with bar(total=len(prompts), unit="prompt") as progress:
        for index, best_first in zip(chosen, ranked, strict=True):
            first = min(best_first, key=lambda candidate: candidate.index)
            pair = [first.image, best_first[0].image]
            yield index, list(verdicts_on(classifier, emoji, index, pair)), pair[1]
            progress.update()


@torch.inference_mode()
def reconstructed(model: DallE, images: Tensor) -> Tensor:
    """Return what the image tokenizer makes of images [N, 3, H, W], uint8: the upper bound."""
    size = model.image_tokenizer.image_size
    codes = [
        model.encode(image.resize((size, size), Image.Resampling.LANCZOS))
        for image in to_pil(to_float(images))
    ]
    return torch.stack([to_tensor(image) for image in model.decode(torch.stack(codes))])


def shares(name: str, verdicts: Sequence[Verdict]) -> Scores:
    """Yield the number of some samples and their scores; nothing without samples."""
    if not (number := len(verdicts)):
        return
    yield f"{name}/prompts", number
    yield f"{name}/concept", sum(v.concept for v in verdicts) / number
    yield f"{name}/artist", sum(v.artist for v in verdicts) / number
    yield f"{name}/both", sum(v.concept and v.artist for v in verdicts) / number
    yield f"{name}/distance", sum(v.distance for v in verdicts) / number
    yield f"{name}/of nearest", sum(v.of_nearest for v in verdicts) / number
    yield f"{name}/closest", sum(v.distance < v.to_others for v in verdicts) / number


def table(scores: dict[str, float]) -> str:
    """Return the scores as a table, with 95 % intervals of the shares."""
    rows = dict.fromkeys(name.rpartition("/")[0] for name in scores)
    lines = [f"{'pairs':24}prompts" + "".join(f"{part:>22}" for part in PARTS) + "   distances"]
    for row in rows:
        cells, number = "", int(scores[f"{row}/prompts"])
        for part in PARTS:
            low, high = wilson_interval(scores[f"{row}/{part}"], number)
            cells += f"{scores[f'{row}/{part}']:9.1%} ({low:.0%} to {high:.0%})".rjust(22)
        others = ("distance", "of nearest", "closest")
        found = [
            f"{name} {scores[key]:.3f}" for name in others if (key := f"{row}/{name}") in scores
        ]
        lines.append(f"{row:24}{number:7}{cells}   {', '.join(found)}")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors(), notes():
        options = parse(EmojiOptions, args, __doc__ or "")
        options.out.mkdir(parents=True, exist_ok=True)
        scores = dict(evaluate_emoji(options))
        write_report(options.out / "emoji.json", options, scores)
        print(table(scores))
        print(f"wrote {options.out / 'emoji.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
