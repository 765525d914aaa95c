"""Ways of sampling, compared on the same Toybox prompts by a classifier that never reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dalle1.clip import Clip
from dalle1.evaluation.classifier import ToyboxClassifier
from dalle1.evaluation.toybox_prompts import Prompt
from dalle1.sampling.ranking import RankingPipeline
from dalle1.toybox import render

PROMPTS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of a table: a model, and how it samples."""

    name: str
    model: RankingPipeline
    how: Mapping[str, Any] = field(default_factory=dict)
    reads_images: bool = False
    """Whether it is told the embedding of a rendering of each prompt's scene."""
    rewrite: Callable[[Prompt], str] | None = None
    """What it is told instead of a prompt's text, such as weights of words."""
    negative: Callable[[Prompt], str] | None = None
    """The negative prompt of each prompt."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The candidates of one prompt, in the order of sampling."""

    correct: list[bool]
    """Whether everything is correct."""
    pairs: list[bool]
    """Whether every object has its own fill; empty where fills are not visible."""
    best: int
    """Index of the best by CLIP."""
    diversity: float
    """Mean cosine distance of the candidates from each other."""


def measured(
    row: Variant,
    prompts: Sequence[Prompt],
    classifier: ToyboxClassifier,
    clip: Clip,
    number: int,
    seed: int,
) -> Iterator[Measured]:
    """Yield what `number` candidates of each prompt show, all by the same CLIP.

    Every 16 prompts have another seed, `seed` and up: candidates of one seed have the same noise.
    """
    at_once = 1 if row.negative else PROMPTS_AT_ONCE  # a negative prompt is that of one call
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        more: dict[str, Any] = {}
        if row.reads_images:
            scenes = [render(p.scene, row.model.image_tokenizer.image_size) for p in part]
            more["image_embeddings"] = clip.embed_images(scenes)
        if row.negative:
            more["negative_prompt"] = row.negative(part[0])
        texts = [row.rewrite(p) if row.rewrite else p.text for p in part]
        how = {"num_candidates": number, "seed": seed, "rerank": "none", **row.how, **more}
        how["seed"] += start // PROMPTS_AT_ONCE
        for prompt, candidates in zip(part, row.model.sample(texts, **how), strict=True):
            images = [candidate.image for candidate in candidates]
            found = [v.compare(prompt.scene) for v in classifier.classify(images)]
            embeddings = clip.embed_images(images)
            yield Measured(
                correct=[bool(aspects["all"]) for aspects in found],
                pairs=[bool(a["both"]) for a in found if a["both"] is not None],
                best=int((embeddings @ clip.embed_text([prompt.text])[0]).argmax()),
                diversity=mean_distance(embeddings),
            )


def mean_distance(embeddings: Tensor) -> float:
    """Return the mean cosine distance between different unit vectors [N, D]; 0 for one."""
    if len(embeddings) < 2:
        return 0.0
    pairs = torch.triu_indices(len(embeddings), len(embeddings), 1)
    return float(1 - (embeddings @ embeddings.T)[pairs[0], pairs[1]].mean())
