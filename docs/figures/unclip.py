"""Make the pages of images of docs/dalle2.md: python docs/figures/unclip.py [NAME ...]."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from images import samples, titled
from PIL import Image

from dalle1.data.images import grid
from dalle1.toybox import Toybox
from dalle2.loading import load_pipeline
from dalle2.manipulation import Manipulator
from dalle2.pipeline import Unclip

SIDE = 128
BLENDED = ((1, 6), (3, 4), (8, 14))
"""Scenes of the validation split whose single things are blended."""
EDITED = (
    ("a red star", "a blue star"),
    ("a yellow mug", "a wooden mug"),
    ("a green cat", "a green dog"),
)


@cache
def bundled() -> Unclip:
    """Load the bundled DALL·E 2, once."""
    model = load_pipeline("unclip", device="cpu")
    assert isinstance(model, Unclip)
    return model


def scenes(count: int) -> list[tuple[Image.Image, str]]:
    """Return renderings of one thing each, with captions, that no training saw."""
    world, found = Toybox("validation", size=SIDE), []
    for i in range(1000):
        if len(world.scene(i).items) == 1 and world.scene(i).style is None:
            found.append(world[i])
        if len(found) == count:
            break
    return found


def rows(cells: list[list[Image.Image]], title: str) -> Image.Image:
    """Tile rows of images; the first column is titled."""
    shown = [titled(x, "" if i else title) for row in cells for i, x in enumerate(row)]
    return grid(shown, len(cells[0]))


def variations() -> Image.Image:
    """Show renderings, and seven variations of each: z_i stays, the noise is new."""
    manipulator = Manipulator(model=bundled())
    sources = [image for image, _ in scenes(4)]
    return rows([[image, *manipulator.vary(image, 7)] for image in sources], "rendering")


def blends() -> Image.Image:
    """Show interpolations between two renderings, both restored at the ends."""
    manipulator, sources = Manipulator(model=bundled()), [image for image, _ in scenes(15)]
    return grid([x for a, b in BLENDED for x in manipulator.blend(sources[a], sources[b], 8)], 8)


def edits() -> Image.Image:
    """Show sampled images whose embedding turns towards the difference of two captions."""
    cells = []
    for before, after in EDITED:
        (image,) = bundled().generate(before, num_images=1, num_candidates=16, seed=0)
        found = Manipulator(model=bundled()).edit(image, before, after, 8)
        titles = [before, *[""] * 6, after]
        cells += [titled(x, title) for x, title in zip(found, titles, strict=True)]
    return grid(cells, 8)


FIGURES: dict[str, Callable[[], Image.Image]] = {
    "samples": lambda: samples(bundled()),
    "variations": variations,
    "blends": blends,
    "edits": edits,
}


def main() -> None:
    for name in sys.argv[1:] or FIGURES:
        if name not in FIGURES:
            sys.exit(f"got {name}, expected one of {', '.join(FIGURES)}")
        path = Path(__file__).parents[1] / f"unclip-{name}.png"
        FIGURES[name]().save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
