"""Toybox, rendered when it is read, as a source."""

from __future__ import annotations

import random

from PIL import Image

from dalle1.data.sources.indexed import IndexedSource
from dalle1.toybox import Toybox


class ToyboxSource(IndexedSource):
    """Scenes of Toybox, of which validation has its own; encode is train."""

    def __init__(self, split: str, size: int, seed: int, num_scenes: int | None) -> None:
        world = "train" if split == "encode" else split
        self.toybox = Toybox(world, size=size, seed=seed, num_scenes=num_scenes)

    def __len__(self) -> int:
        return len(self.toybox)

    def name(self, index: int) -> str:
        return f"Toybox scene {index}"

    def caption(self, index: int, rng: random.Random) -> str:
        return self.toybox.caption(index, rng)

    def image(self, index: int) -> Image.Image:
        return self.toybox.image(index)
