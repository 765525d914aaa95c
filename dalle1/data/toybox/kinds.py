"""Scenes of one kind, without end: one thing, several alike, or two in a relation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from dalle1.data.toybox.scene import Scene, sample_scene

Kind = Literal["any", "one", "count", "relation"]


def scenes(split: str, seed: str, kind: Kind = "any") -> Iterator[Scene]:
    """Yield scenes of a split (see `sample_scene`) that are of one kind."""
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng, split)
        if kind in ("any", kind_of(scene)):
            yield scene


def kind_of(scene: Scene) -> Kind:
    """Say of which kind a scene is."""
    if scene.relation is not None:
        return "relation"
    return "count" if len(scene.items) > 1 else "one"
