"""The neon style: the lines of each object as glowing tubes before a dark wall."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from dalle1.toybox.layers import Floats, Layers, to_floats, to_image
from dalle1.toybox.tile import Rgb

# The light of a fill's contour and of the lines inside. A material gets the two colours that it is
# known by.
_RED, _ORANGE, _YELLOW, _GREEN = (255, 44, 60), (255, 140, 30), (255, 224, 50), (50, 240, 100)
_BLUE, _VIOLET, _PINK, _CYAN = (50, 110, 255), (168, 70, 255), (255, 90, 180), (40, 230, 240)
_WHITE, _BROWN, _GREY, _BLACK = (255, 250, 240), (190, 110, 60), (150, 160, 180), (84, 84, 110)
_LIME, _GOLD, _ICE = (170, 240, 60), (255, 190, 50), (150, 225, 255)

TUBES: dict[str, tuple[Rgb, Rgb]] = {
    "red": (_RED, _RED),
    "orange": (_ORANGE, _ORANGE),
    "yellow": (_YELLOW, _YELLOW),
    "green": (_GREEN, _GREEN),
    "blue": (_BLUE, _BLUE),
    "purple": (_VIOLET, _VIOLET),
    "pink": (_PINK, _PINK),
    "brown": (_BROWN, _BROWN),
    "black": (_BLACK, _BLACK),
    "white": (_WHITE, _WHITE),
    "grey": (_GREY, _GREY),
    "turquoise": (_CYAN, _CYAN),
    "avocado": (_LIME, _BROWN),
    "watermelon": (_GREEN, _RED),
    "strawberry": (_RED, _YELLOW),
    "kiwi": (_BROWN, _LIME),
    "lemon": (_YELLOW, _WHITE),
    "zebra": (_WHITE, _GREY),
    "tiger": (_ORANGE, _WHITE),
    "leopard": (_GOLD, _BROWN),
    "brick": (_RED, _ORANGE),
    "checkerboard": (_WHITE, _WHITE),
    "polka dot": (_BLUE, _WHITE),
    "galaxy": (_VIOLET, _PINK),
    "wood": (_BROWN, _GOLD),
    "gold": (_GOLD, _YELLOW),
    "knitted": (_PINK, _VIOLET),
    "rainbow": (_RED, _BLUE),
    "candy cane": (_WHITE, _RED),
    "pineapple": (_YELLOW, _GREEN),
    "chocolate": (_BROWN, _ORANGE),
    "marble": (_WHITE, _ICE),
    "denim": (_BLUE, _ORANGE),
    "ice": (_ICE, _CYAN),
    "ladybird": (_RED, _GREY),
    "peacock": (_CYAN, _GREEN),
    "lava": (_ORANGE, _RED),
    "honeycomb": (_GOLD, _ORANGE),
    "silver": (_GREY, _WHITE),
    "pizza": (_ORANGE, _GREEN),
}


def neon(layers: Layers) -> Image.Image:
    """Render the lines as glowing tubes before a dark brick wall."""
    size = layers.things.width
    light = _wide(layers.tubes, 0.05) * 1.1 + _wide(layers.tubes, 0.016) * 0.75
    wall = _wall(size, layers.background)
    cover = to_floats(layers.cover)[..., None]
    things = np.asarray(layers.things, np.float32)
    ground = wall + cover * (0.2 * things - 0.75 * wall)
    lit = ground * (1 + light / 255) + light * 0.85
    lines = np.maximum(to_floats(layers.outline), to_floats(layers.details))[..., None]
    core = 0.62 * np.asarray(layers.tubes, np.float32) / np.maximum(lines, 0.2) + 0.42 * 255 * lines
    return to_image((lit + (core - lit) * lines).astype(np.float32))


@lru_cache(maxsize=16)
def _wall(size: int, tint: Rgb) -> Floats:
    """Return a dark wall with a hint of the background's hue."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    row = np.floor(y * 12)
    joint = np.minimum(y * 12 % 1.0, 1.0) < 0.1
    joint |= ((x * 5 + 0.5 * (row % 2)) % 1.0) < 0.042
    brick = 0.16 + 0.04 * np.sin(row * 12.9 + np.floor(x * 5 + 0.5 * (row % 2)) * 78.2)
    tone = np.where(joint, 0.09, brick) * (1.15 - 0.9 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))
    hue = np.asarray(tint, np.float32) - 0.75 * min(tint)
    return (tone[..., None] * (hue * 0.9 + np.asarray((96, 80, 150), np.float32))).astype(
        np.float32
    )


def _wide(image: Image.Image, radius: float) -> Floats:
    """Blur by a radius in image widths, at a lower resolution where that makes no difference."""
    size = image.width
    few = max(1, round(radius * size / 2))
    small = image.reduce(few).filter(ImageFilter.GaussianBlur(radius * size / few))
    return np.asarray(small.resize((size, size), Image.Resampling.BILINEAR), np.float32)
