"""Draw the README's picture: python docs/samples.py

The best four of 16 candidates for each prompt, by the bundled CLIP, seed 0.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dalle1 import DallE
from dalle1.data.images import grid
from dalle1.data.toybox import FILLS, NOUNS, is_held_out

PROMPTS = (
    "an avocado armchair",
    "a zebra snail",
    "a strawberry teapot",
    "a galaxy mug",
    "a watermelon handbag",
    "a gold fish",
    "a red star",
    "two blue hearts",
)


def never_seen(prompt: str) -> bool:
    """Say whether the prompt names a fill and a noun that training never joined."""
    words = prompt.split()
    fills = [f for f in FILLS if f in prompt]
    nouns = [n for n in NOUNS if n in words]
    return any(is_held_out(f, n) for f in fills for n in nouns)


def titled(image: Image.Image, title: str) -> Image.Image:
    """Put a title under a picture."""
    font = ImageFont.load_default(15)
    sheet = Image.new("RGB", (image.width, image.height + 24), "white")
    sheet.paste(image, (0, 0))
    ImageDraw.Draw(sheet).text(
        (image.width / 2, image.height + 8), title, "#333", font, anchor="mm"
    )
    return sheet


def main() -> None:
    model = DallE.from_pretrained()
    cells = []
    for prompt in PROMPTS:
        best = grid(model.generate(prompt, num_images=4, num_candidates=16, seed=0), 2)
        cells.append(titled(best, prompt + (" ★" if never_seen(prompt) else "")))
    path = Path(__file__).with_name("samples.png")
    grid(cells, 4).save(path)
    print(path)


if __name__ == "__main__":
    main()
