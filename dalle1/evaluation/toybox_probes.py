"""Probes of a CLIP on Toybox: nouns and fills, their binding, relations, and retrieval."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from PIL import Image

from dalle1.clip import Clip
from dalle1.evaluation.clip_metrics import (
    binding_accuracy,
    linear_probe_accuracy,
    retrieval_recall,
)
from dalle1.evaluation.report import CHANCE, Scores
from dalle1.toybox import FILLS, NOUNS, Scene, describe, render, sample_scene
from dalle1.toybox.captions import article, plain_caption
from dalle1.toybox.kinds import scenes
from dalle1.toybox.vocabulary import OPPOSITE

SPLITS = {"training": "validation", "held-out": "heldout"}
"""New scenes of the pairs that training uses, and of those that it never uses."""

SIZE = 128  # side of the renderings in pixels; each CLIP resizes them


def scenes_of_distinct_pairs(stream: Iterator[Scene], count: int) -> list[Scene]:
    """Return the first `count` scenes of which no two have the same noun with the same fill."""
    found: dict[tuple[str, str], Scene] = {}
    while len(found) < count:
        scene = next(stream)
        found.setdefault(scene.items[0].pair, scene)
    return list(found.values())


def toybox_probes(clip: Clip, num_images: int = 400, seed: int = 0) -> Scores:
    """Yield all probes, on `num_images` each.

    Names of zero-shot accuracy and binding begin with `training/` or `held-out/`.
    """
    for name, split in SPLITS.items():
        stream = scenes(split, f"{name} {seed}", "one")
        singles = list(islice(stream, num_images))
        for key, value in _zero_shot_probes(clip, singles):
            yield f"{name}/zero-shot/{key}", value
        stream = scenes(split, f"{name} {seed} related", "two")
        related = list(islice((scene for scene in stream if len(scene.items) == 2), num_images))
        for key, value in _binding_probes(clip, related):
            yield f"{name}/binding/{key}", value
    for key, value in _linear_probes(clip, num_images, seed):
        yield f"linear probe/{key}", value
    for key, value in retrieval_probe(clip, seed):
        yield f"retrieval/{key}", value


def _zero_shot_probes(clip: Clip, shown: list[Scene]) -> Scores:
    """Yield how often the nearest of the captions "a FILL NOUN" has the right words."""
    images = clip.embed_images([render(scene, SIZE) for scene in shown])
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


def _linear_probes(clip: Clip, num_images: int, seed: int) -> Scores:
    """Yield the accuracy of linear probes for nouns and fills, with equally many images of each."""
    for what, words in {"noun": NOUNS, "fill": FILLS}.items():
        per_word = max(4, num_images // len(words))
        groups: dict[str, list[Scene]] = {word: [] for word in words}
        stream = scenes("validation", f"linear probe {what} {seed}", "one")
        while min(map(len, groups.values())) < per_word:
            scene = next(stream)
            group = groups[getattr(scene.items[0], what)]
            if len(group) < per_word:
                group.append(scene)
        shown = [scene for group in groups.values() for scene in group]
        embeds = clip.embed_images([render(scene, SIZE) for scene in shown])
        labels = [i for i, group in enumerate(groups.values()) for _ in group]
        for key, value in linear_probe_accuracy(embeds, labels):
            yield f"{what}{key.removeprefix('accuracy')}", value


def _binding_probes(clip: Clip, related: list[Scene]) -> Scores:
    """Yield the binding accuracy for foils with swapped fills, or with the opposite relation."""

    def fills_swapped(scene: Scene) -> Scene:
        first, second = scene.items
        items = (replace(first, fill=second.fill), replace(second, fill=first.fill))
        return replace(scene, items=items)

    def reversed_relation(scene: Scene) -> Scene:
        return replace(scene, relation=OPPOSITE[str(scene.relation)])

    images: list[Image.Image] = [render(scene, SIZE) for scene in related]
    captions = list(map(plain_caption, related))
    for name, changed in (("fills swapped", fills_swapped), ("relation turned", reversed_relation)):
        foils = [plain_caption(changed(scene)) for scene in related]
        for key, value in binding_accuracy(clip, images, captions, foils):
            yield f"{name}{key.removeprefix('accuracy')}", value


def retrieval_probe(clip: Clip, seed: int) -> Scores:
    """Yield the recall among 256 scenes of one object, of distinct pairs, and of all kinds."""
    singles = scenes_of_distinct_pairs(scenes("validation", f"retrieval {seed}", "one"), 256)
    rng = random.Random(f"retrieval of all {seed}")
    for name, shown in {
        "one object": singles,
        "all kinds": [sample_scene(rng, "validation") for _ in range(256)],
    }.items():
        captions = [describe(scene, rng) for scene in shown]
        images = clip.embed_images([render(scene, SIZE) for scene in shown])
        for key, value in retrieval_recall(images, clip.embed_text(captions), captions):
            yield f"{name}/{key}", value
