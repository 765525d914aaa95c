"""Endless scenes of one kind: one object, several alike, two kinds in a relation, a style."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from dalle1.toybox.scene import Scene, sample_scene

Kind = Literal["one", "two", "count", "style", "other"]
"""One object; two kinds in a relation; several alike; one in a style; several in a style."""

GROUPS = ("two", "styled", "rest")
"""Two kinds in a relation, in any style; others in a style; the rest."""


def scenes(split: str, seed: str, kind: Kind | None = None) -> Iterator[Scene]:
    """Yield scenes of a split (see `sample_scene`) of one kind, or of every kind for None."""
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng, split)
        if kind in (None, kind_of(scene)):
            yield scene


def kind_of(scene: Scene) -> Kind:
    """Return the kind of a scene."""
    if scene.style is not None:
        return "style" if len(scene.items) == 1 else "other"
    if scene.relation is not None:
        return "two"
    return "one" if len(scene.items) == 1 else "count"


def group_of(scene: Scene) -> str:
    """Return which of `GROUPS` a scene is in."""
    if scene.relation is not None:
        return "two"
    return "rest" if scene.style is None else "styled"
