"""Toybox as a dataset: scene i of a split is the same on every machine."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image

from dalle1.toybox.captions import describe
from dalle1.toybox.kinds import GROUPS, group_of
from dalle1.toybox.render import MAX_SIZE, MIN_SIZE, render
from dalle1.toybox.scene import Scene, sample_scene
from dalle1.toybox.vocabulary import SPLITS, check_word

ENDLESS = 2**31 - 1  # the length of a dataset without a limit; the largest that samplers accept


class Toybox:
    """A map-style dataset of (image, caption), rendered on the fly.

    Scene `index` depends on the split, the seed, the shares and the index alone, not on `size`, so
    the same scenes can be rendered at any resolution.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 128,
        seed: int = 0,
        num_scenes: int | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        """Describe a dataset; nothing is rendered yet.

        Args:
            size: image side in pixels.
            num_scenes: its length; None is endless.
            shares: weights of the scenes with two kinds in a relation, of the others in a style,
                and of the rest; None are those of `sample_scene`.

        Raises: ValueError for what is out of range.
        """
        check_word("split", split, SPLITS)
        if isinstance(size, bool) or not isinstance(size, int) or not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(
                f"got size {size!r}, expected whole pixels from {MIN_SIZE} to {MAX_SIZE}: try 128"
            )
        if num_scenes is not None and not 0 < num_scenes <= ENDLESS:
            raise ValueError(
                f"got num_scenes {num_scenes}, expected 1 to {ENDLESS}: None for an endless dataset"
            )
        if shares is not None and (
            len(shares) != len(GROUPS)
            or not all(0 <= share < math.inf for share in shares)
            or not 0 < sum(shares) < math.inf
        ):
            raise ValueError(
                f"got shares {' '.join(f'{share:g}' for share in shares)}, expected three weights, "
                "of two kinds in a relation, styles, and the rest, such as 40 25 35"
            )
        self.split, self.size, self.seed = split, size, seed
        self.num_scenes, self.shares = num_scenes, shares

    def __len__(self) -> int:
        return ENDLESS if self.num_scenes is None else self.num_scenes

    def scene(self, index: int) -> Scene:
        """Return the scene that image `index` shows."""
        if not 0 <= index < len(self):
            raise IndexError(f"got index {index}, expected 0 to {len(self) - 1}")
        rng = random.Random(f"{self.split}/{self.seed}/{index}")
        if self.shares is None:
            return sample_scene(rng, self.split)
        (group,) = rng.choices(GROUPS, self.shares)
        while group_of(scene := sample_scene(rng, self.split)) != group:
            pass
        return scene

    def caption(self, index: int, rng: random.Random | None = None) -> str:
        """Return a caption of image `index`; `rng` varies the phrasing, None does not."""
        rng = rng or random.Random(f"{self.split}/{self.seed}/{index}/caption")
        return describe(self.scene(index), rng)

    def image(self, index: int) -> Image.Image:
        """Render image `index`, in RGB."""
        return render(self.scene(index), self.size)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self.image(index), self.caption(index)
