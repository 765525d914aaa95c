"""Plot the figures of sampling.md: python docs/figures/sampling.py"""

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
COUNTS = (1, 4, 16)
SIDE = 160  # of an image, in pixels
SCALES = (1, 2, 3, 4, 5)
WEIGHTED, WEIGHTS = ("an (avocado:{}) armchair", "a (zebra:{}) mug"), (-1, 0, 1, 2, 4)


def titled(image: Image.Image, title: str) -> Image.Image:
    """Add a title under an image made small."""
    return images.titled(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), title)


def best_of(model: DallE) -> Image.Image:
    """Show for each prompt the best, by CLIP, of its first 1, 4 and 16 candidates."""
    cells = []
    for prompt in PROMPTS:
        ranked = model.candidates(prompt, num_candidates=max(COUNTS), seed=0)
        for count in COUNTS:
            best = next(c for c in ranked if c.index < count)
            cells.append(titled(best.image, f"best of {count}: {best.score:.3f}"))
    return grid(cells, len(COUNTS))


def scenes(count: int, size: int) -> list[tuple[Image.Image, str]]:
    """Return validation scenes of one object with short captions."""
    world, found = Toybox("validation", size=size), []
    for i in range(1000):
        if len(world.scene(i).items) == 1 and len(world.caption(i)) < 20:
            found.append((world.image(i), world.caption(i)))
    return found[:count]


def row(model: DallE, scene: tuple[Image.Image, str], mask: Image.Image) -> list[Image.Image]:
    """Show an image, what is kept of it, and the four likeliest of 16 that complete it."""
    photo, caption = scene
    kept = photo.copy()
    kept.paste("grey", mask=mask)
    known = model.encode_known(photo, mask=mask)
    completions = model.candidates(caption, num_candidates=16, seed=0, known_codes=known)
    cells = [titled(photo, caption), titled(kept, "kept")]
    best = enumerate(completions[:4], 1)
    return cells + [titled(c.image, f"best of 16, no. {i}") for i, c in best]


def completed(model: DallE, box: Sequence[float]) -> Image.Image:
    """Sample again what is in the box, whose corners are fractions of the side."""
    cells = []
    for photo, caption in scenes(4, model.image_tokenizer.image_size):
        mask = Image.new("L", photo.size)
        corners = [int(part * photo.width) for part in box]
        ImageDraw.Draw(mask).rectangle((*corners[:2], corners[2] - 1, corners[3] - 1), fill=255)
        cells += row(model, (photo, caption), mask)
    return grid(cells, 6)


def guided(model: DallE) -> Image.Image:
    """Show the first candidate of each prompt as guidance grows."""
    cells = []
    for prompt in PROMPTS:
        for scale in SCALES:
            image = model.candidates(prompt, num_candidates=1, seed=0, guidance=scale)[0].image
            cells.append(titled(image, f"guidance {scale}"))
    return grid(cells, len(SCALES))


def weighted(model: DallE) -> Image.Image:
    """Show the first candidate of some prompts as the weight of a word grows."""
    cells = []
    for prompt in WEIGHTED:
        for weight in WEIGHTS:
            text = prompt.format(weight)
            image = model.candidates(text, num_candidates=1, seed=0, weighted=True)[0].image
            cells.append(titled(image, f"weight {weight}"))
    return grid(cells, len(WEIGHTS))


def main() -> None:
    model = DallE.from_pretrained(device="cpu")
    sheets = {
        "best-of": best_of(model),
        "completion": completed(model, (0, 0.5, 1, 1)),
        "hole": completed(model, (0.25, 0.25, 0.75, 0.75)),
        "guidance": guided(model),
        "weights": weighted(model),
    }
    for name, sheet in sheets.items():
        path = HERE / f"sampling-{name}.png"
        sheet.save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
