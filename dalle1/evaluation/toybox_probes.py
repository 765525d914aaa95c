"""The probes of a CLIP on Toybox: what it is made of, what it is, what belongs to what."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from PIL import Image

from dalle1.clip import Clip
from dalle1.evaluation.clip_metrics import Scores, binding, linear_probe, retrieval
from dalle1.evaluation.report import CHANCE
from dalle1.toybox import FILLS, NOUNS, Scene, describe, render, sample_scene
from dalle1.toybox.captions import article, plain_caption
from dalle1.toybox.kinds import scenes
from dalle1.toybox.vocabulary import OPPOSITE

SPLITS = {"training": "validation", "held-out": "heldout"}
"""Of pairs: fresh scenes of those that training sees, and of those that it does not."""

SIZE = 128  # of the pictures in pixels; each CLIP brings them to its own


def of_different_pairs(stream: Iterator[Scene], count: int) -> list[Scene]:
    """Take the first `count` scenes of which no two show the same fill of the same noun."""
    found: dict[tuple[str, str], Scene] = {}
    while len(found) < count:
        scene = next(stream)
        found.setdefault(scene.items[0].pair, scene)
    return list(found.values())


def toybox_probes(clip: Clip, pictures: int = 400, seed: int = 0) -> Scores:
    """Yield all of them, on so many pictures each; names begin with `training/` or `held-out/`."""
    for name, split in SPLITS.items():
        stream = scenes(split, f"{name} {seed}", "one")
        shown = [next(stream) for _ in range(pictures)]
        embeds = clip.embed_images([render(scene, SIZE) for scene in shown])
        for key, value in _zero_shot(clip, embeds, shown):
            yield f"{name}/zero-shot/{key}", value
        stream = scenes(split, f"{name} {seed} related", "two")
        related = list(islice((scene for scene in stream if len(scene.items) == 2), pictures))
        for key, value in _binding(clip, related):
            yield f"{name}/binding/{key}", value
    for key, value in _linear_probes(clip, pictures, seed):
        yield f"linear probe/{key}", value
    for key, value in retrieval_probe(clip, seed):
        yield f"retrieval/{key}", value


def _zero_shot(clip: Clip, images: torch.Tensor, shown: list[Scene]) -> Scores:
    """Take the nearest of the captions "a FILL NOUN" of all pairs, and read both words off it."""
    pairs = [(fill, noun) for fill in FILLS for noun in NOUNS]
    captions = clip.embed_text([f"{article(fill)} {noun}" for fill, noun in pairs])
    nearest = [pairs[i] for i in (images @ captions.T).argmax(1).tolist()]
    truth = [scene.items[0].pair for scene in shown]
    counts = {
        "noun": (sum(a[1] == b[1] for a, b in zip(nearest, truth)), len(NOUNS)),
        "fill": (sum(a[0] == b[0] for a, b in zip(nearest, truth)), len(FILLS)),
        "both": (sum(a == b for a, b in zip(nearest, truth)), len(pairs)),
    }
    for name, (hits, choices) in counts.items():
        yield name, hits / len(truth)
        yield name + CHANCE, 1 / choices


def _linear_probes(clip: Clip, pictures: int, seed: int) -> Scores:
    """Yield how well noun and fill can be read off, from as many pictures of each."""
    for what, words in {"noun": NOUNS, "fill": FILLS}.items():
        each = max(4, pictures // len(words))
        found: dict[str, list[Scene]] = {word: [] for word in words}
        stream = scenes("validation", f"linear probe {what} {seed}", "one")
        while min(map(len, found.values())) < each:
            scene = next(stream)
            group = found[getattr(scene.items[0], what)]
            group.extend([scene] if len(group) < each else [])
        shown = [scene for group in found.values() for scene in group]
        embeds = clip.embed_images([render(scene, SIZE) for scene in shown])
        labels = [i for i, group in enumerate(found.values()) for _ in group]
        for key, value in linear_probe(embeds, labels):
            yield f"{what}{key.removeprefix('accuracy')}", value


def _binding(clip: Clip, related: list[Scene]) -> Scores:
    """Ask for the caption or its foil: fills swapped, or the relation turned."""

    def fills_swapped(scene: Scene) -> Scene:
        first, second = scene.items
        items = (replace(first, fill=second.fill), replace(second, fill=first.fill))
        return replace(scene, items=items)

    def turned(scene: Scene) -> Scene:
        return replace(scene, relation=OPPOSITE[str(scene.relation)])

    images: list[Image.Image] = [render(scene, SIZE) for scene in related]
    captions = list(map(plain_caption, related))
    for name, changed in (("fills swapped", fills_swapped), ("relation turned", turned)):
        foils = [plain_caption(changed(scene)) for scene in related]
        for key, value in binding(clip, images, captions, foils):
            yield f"{name}{key.removeprefix('accuracy')}", value


def retrieval_probe(clip: Clip, seed: int) -> Scores:
    """Find partners among 256 scenes of one object, of different pairs; and of all kinds."""
    alone = of_different_pairs(scenes("validation", f"retrieval {seed}", "one"), 256)
    rng = random.Random(f"retrieval of all {seed}")
    for name, shown in {
        "one object": alone,
        "all kinds": [sample_scene(rng, "validation") for _ in range(256)],
    }.items():
        captions = [describe(scene, rng) for scene in shown]
        images = clip.embed_images([render(scene, SIZE) for scene in shown])
        for key, value in retrieval(images, clip.embed_text(captions), captions):
            yield f"{name}/{key}", value
