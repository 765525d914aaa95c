"""Draw the pictures of sampling.md: python docs/figures/sampling.py"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import images
from PIL import Image, ImageDraw

from dalle1 import DallE
from dalle1.data.images import grid
from dalle1.toybox import Toybox

HERE = Path(__file__).parents[1]
PROMPTS = ("an avocado armchair", "a zebra handbag", "a strawberry house", "two blue hearts")
COUNTS = (1, 4, 16, 64)
SIDE = 160  # of a picture, in pixels
SCALES = (1, 2, 3, 4, 5)


def titled(image: Image.Image, title: str) -> Image.Image:
    """Put a title under a picture made small."""
    return images.titled(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), title)


def best_of(model: DallE) -> Image.Image:
    """Show for each prompt the best, by CLIP, of its first 1, 4, 16 and 64 candidates."""
    cells = []
    for prompt in PROMPTS:
        ranked = model.candidates(prompt, num_candidates=max(COUNTS), seed=0)
        for count in COUNTS:
            best = next(c for c in ranked if c.index < count)
            cells.append(titled(best.image, f"best of {count}: {best.score:.3f}"))
    return grid(cells, len(COUNTS))


def scenes(count: int, size: int) -> list[tuple[Image.Image, str]]:
    """Give validation scenes of one object with short captions."""
    world, found = Toybox("validation", size=size), []
    for i in range(1000):
        if len(world.scene(i).items) == 1 and len(world.caption(i)) < 20:
            found.append((world.image(i), world.caption(i)))
    return found[:count]


def row(model: DallE, scene: tuple[Image.Image, str], mask: Image.Image) -> list[Image.Image]:
    """Show a picture, what is kept of it, and the four likeliest of 16 that complete it."""
    picture, caption = scene
    kept = picture.copy()
    kept.paste("grey", mask=mask)
    given = model.encode_known(picture, mask=mask)
    drawn = model.candidates(caption, num_candidates=16, seed=0, known_codes=given)
    cells = [titled(picture, caption), titled(kept, "kept")]
    return cells + [titled(c.image, f"best of 16, no. {i}") for i, c in enumerate(drawn[:4], 1)]


def completed(model: DallE, box: Sequence[float]) -> Image.Image:
    """Have what is in the box, in parts of the side, drawn anew."""
    cells = []
    for picture, caption in scenes(4, model.image_tokenizer.image_size):
        mask = Image.new("L", picture.size)
        corners = [int(part * picture.width) for part in box]
        ImageDraw.Draw(mask).rectangle((*corners[:2], corners[2] - 1, corners[3] - 1), fill=255)
        cells += row(model, (picture, caption), mask)
    return grid(cells, 6)


def guided(model: DallE) -> Image.Image:
    """Show the first candidate of each prompt as guidance grows."""
    cells = []
    for prompt in PROMPTS:
        for scale in SCALES:
            image = model.candidates(prompt, num_candidates=1, seed=0, guidance=scale)[0].image
            cells.append(titled(image, f"guidance {scale}"))
    return grid(cells, len(SCALES))


def main() -> None:
    model = DallE.from_pretrained(device="cpu")
    sheets = {
        "best-of": best_of(model),
        "completion": completed(model, (0, 0.5, 1, 1)),
        "hole": completed(model, (0.25, 0.25, 0.75, 0.75)),
        "guidance": guided(model),
    }
    for name, sheet in sheets.items():
        path = HERE / f"sampling-{name}.png"
        sheet.save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
