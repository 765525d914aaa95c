"""Plot the README's images: python docs/figures/images.py [NAME ...]; all without a name."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dalle1 import DallE
from dalle1.data.images import grid, to_float, to_pil, to_tensor
from dalle1.evaluation.toybox_prompts import choose_prompts
from dalle1.model.masks import MaskKind, image_mask, joint_mask
from dalle1.tasks.dvae import DVAE_PRESETS
from dalle1.toybox import Toybox


def titled(image: Image.Image, title: str) -> Image.Image:
    """Add a title under an image."""
    font = ImageFont.load_default(15)
    sheet = Image.new("RGB", (image.width, image.height + 24), "white")
    sheet.paste(image, (0, 0))
    ImageDraw.Draw(sheet).text(
        (image.width / 2, image.height + 8), title, "#333", font, anchor="mm"
    )
    return sheet


def captioned(image: Image.Image, caption: str) -> Image.Image:
    """Add a caption of up to three lines under an image."""
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (image.width, image.height + 54), "white")
    sheet.paste(image, (0, 0))
    lines = "\n".join(textwrap.wrap(caption, 26))
    position = (image.width / 2, image.height + 6)
    ImageDraw.Draw(sheet).multiline_text(position, lines, "#333", font, anchor="ma", align="center")
    return sheet


def toybox() -> Image.Image:
    """Show some scenes of the training split above their captions."""
    world = Toybox("train", size=176)
    return grid([captioned(*world[i]) for i in range(16, 40)], 6)


def samples(model: DallE) -> Image.Image:
    """Show the best of 16 candidates for prompts of pairs that training never saw together.

    The prompts are the first of the evaluation's, the best is CLIP's alone, the seed 0.
    """
    cells = []
    for prompt in tqdm(choose_prompts("heldout", 24, seed=0), unit="prompt"):
        (best,) = model.generate(prompt.text, num_images=1, num_candidates=16, seed=0)
        cells.append(captioned(best.resize((176, 176), Image.Resampling.LANCZOS), prompt.text))
    return grid(cells, 6)


def reconstructions(model: DallE) -> Image.Image:
    """Show validation images of Toybox above their reconstructions."""
    world = Toybox("validation", size=model.image_tokenizer.image_size)
    originals = [world.image(i) for i in range(8)]
    images = to_float(torch.stack([to_tensor(x) for x in originals]))
    decoded = model.image_tokenizer.decode(model.image_tokenizer.encode(images))
    return grid(originals + to_pil(decoded), 8)


def masks(path: Path) -> None:
    """Plot the masks: whole at 4 × 4 codes and 3 of text, and what one code sees at 32 × 32."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    kinds: tuple[MaskKind, ...] = ("row", "column", "conv", "full")
    colours = ListedColormap(["#f1f5f9", "#60a5fa", "#f97316", "#0f172a"])
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
    row, column = 16, 12
    for above, below, kind in zip(*axes, kinds):
        whole = joint_mask(kind, 3, 4).int()
        whole[:, :3] *= 2  # text
        above.imshow(whole, cmap=colours, vmin=0, vmax=3)
        above.set(title=f"{kind}: attention mask", xticks=[], yticks=[])
        seen = image_mask(kind, 32)[row * 32 + column].view(32, 32).int()
        seen[row, column] = 3
        below.imshow(seen, cmap=colours, vmin=0, vmax=3)
        below.set(title=f"what a code sees: {int((seen > 0).sum())}", xticks=[], yticks=[])
    figure.savefig(path, dpi=70)


def schedules(path: Path) -> None:
    """Plot what changes in the course of stage 1, as its presets have it."""
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(2, 3, figsize=(11, 5), layout="constrained")
    for row, name in zip(rows, ("paper", "small")):
        recipe = DVAE_PRESETS[name]
        last = recipe.schedule_steps or recipe.steps
        curves = (
            ("τ, the temperature", recipe.temperature_at, recipe.temperature_steps),
            ("β, the weight of the KL", recipe.beta_at, recipe.beta_steps),
            ("learning rate", recipe.lr_at, last),
        )
        for axes, (title, value_at, duration) in zip(row, curves):
            steps = [duration * i // 400 for i in range(501)]  # and a quarter more, where it stays
            axes.plot(steps, [value_at(step) for step in steps], color="#c2410c")
            axes.set(title=f"{name}: {title}", xlabel="update", ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)


@cache
def bundled() -> DallE:
    """Load the bundled model, once."""
    return DallE.from_pretrained(device="cpu")


FIGURES: dict[str, Callable[[Path], None]] = {
    "toybox": lambda path: toybox().save(path, optimize=True),
    "masks": masks,
    "schedules": schedules,
    "samples": lambda path: samples(bundled()).save(path, optimize=True),
    "reconstructions": lambda path: reconstructions(bundled()).save(path, optimize=True),
}


def main() -> None:
    for name in sys.argv[1:] or FIGURES:
        if name not in FIGURES:
            sys.exit(f"got {name}, expected one of {', '.join(FIGURES)}")
        path = Path(__file__).parents[1] / f"{name}.png"
        FIGURES[name](path)
        print(path)


if __name__ == "__main__":
    main()
