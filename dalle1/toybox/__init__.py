"""Toybox: a procedurally rendered dataset of captioned images.

It needs no download and never ends: images of objects (armchairs, teapots, snails) made of other
things (avocado, brick, galaxy), with captions that are always true. A tenth of all combinations,
the avocado armchair among them, is held out of training. An evaluation uses the held-out pairs to
measure whether a model composes combinations that it has never seen.
"""

from __future__ import annotations

from dalle1.toybox.captions import describe
from dalle1.toybox.dataset import Toybox
from dalle1.toybox.render import render
from dalle1.toybox.scene import Item, Scene, sample_scene
from dalle1.toybox.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    FILL_SURVIVES,
    FILLS,
    NOUNS,
    RELATIONS,
    SIZES,
    SPLITS,
    STYLES,
    is_held_out,
    is_style_held_out,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "CONCEPTS",
    "FILLS",
    "FILL_SURVIVES",
    "NOUNS",
    "RELATIONS",
    "SIZES",
    "SPLITS",
    "STYLES",
    "Item",
    "Scene",
    "Toybox",
    "describe",
    "is_held_out",
    "is_style_held_out",
    "render",
    "sample_scene",
]
