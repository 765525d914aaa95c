"""Toybox: a captioned picture world that the program draws itself.

It exists so that everything here can be tried, taught, tested and measured with no download: an
endless supply of pictures of things (armchairs, teapots, snails) made of other things (avocado,
brick, galaxy), with true captions, and a tenth of all combinations kept back, among them the
avocado armchair, to see whether a trained model can compose what it has never seen.
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
