"""Fills: what the objects of Toybox are made of.

A fill is bold and graphic on purpose. The images are meant for a small tokenizer that spends
one code on 8x8 pixels, so a stripe or a dot is about a tenth of the object and nothing is finer.

There are three kinds: plain colours; tiles, painted once, larger than the object, and cropped at
a position that the item's seed selects (more of them in `materials`); and fruit, whose skin
follows the silhouette's edge.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dalle1.toybox import materials
from dalle1.toybox.pen import SPAN
from dalle1.toybox.tile import REACH, Pixels, Rgb, Tile, lattice

COLOUR_VALUES: dict[str, Rgb] = {
    "red": (220, 38, 46),
    "orange": (246, 136, 28),
    "yellow": (252, 212, 36),
    "green": (46, 158, 72),
    "blue": (38, 92, 214),
    "purple": (128, 56, 184),
    "pink": (246, 130, 184),
    "brown": (122, 74, 44),
    "black": (50, 48, 56),
    "white": (252, 252, 252),
    "grey": (146, 150, 158),
    "turquoise": (30, 190, 190),
}


def _wavy_stripes(tile: Tile, period: float, width: float, slant: float, colour: Rgb) -> None:
    """Paint upright stripes that sway and swell."""
    steps = [REACH * i / 40 for i in range(41)]
    for k in range(-8, math.ceil(REACH / period) + 8):

        def edge(y: float, side: float, k: int = k) -> float:
            sway = 0.035 * math.sin(5.2 * y + 1.3 * k) + slant * y
            swell = width * (0.5 + 0.16 * math.sin(7.0 * y + 2.4 * k))
            return k * period + sway + side * swell

        left = [(edge(y, -1), y) for y in steps]
        right = [(edge(y, 1), y) for y in reversed(steps)]
        tile.polygon(left + right, colour)


def _zebra(unit: float) -> Tile:
    tile = Tile(unit, (250, 250, 248))
    _wavy_stripes(tile, 0.2, 0.1, 0.25, (28, 26, 32))
    return tile


def _tiger(unit: float) -> Tile:
    tile = Tile(unit, (248, 142, 30))
    rng = random.Random("tiger")
    for k in range(-1, 13):
        for c in range(-1, 6):  # tapering strokes that reach in from either side
            x = c * 0.44 + (0.22 if k % 2 else 0.0) + rng.uniform(-0.03, 0.03)
            y, turn = k * 0.17, 1 if (k + c) % 2 else -1
            top, low = [], []
            for i in range(13):
                t = i / 12
                bend = 0.06 * math.sin(math.pi * t)
                half = 0.056 * math.sqrt(1 - t) * (0.75 + 0.25 * math.cos(7 * t))
                at = x + turn * (t - 0.5) * 0.42
                top.append((at, y - bend - half))
                low.append((at, y - bend + half))
            tile.polygon(top + low[::-1], (36, 24, 24))
    return tile


def _leopard(unit: float) -> Tile:
    tile = Tile(unit, (236, 184, 104))
    rng = random.Random("leopard")
    for x, y in lattice(0.24, 0.19):
        x, y = x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)
        tile.ellipse(x, y, 0.088, 0.075, (62, 36, 24))
        tile.ellipse(x + 0.012, y + 0.008, 0.045, 0.036, (184, 116, 50))
    return tile


def _brick(unit: float) -> Tile:
    tile = Tile(unit, (232, 218, 202))
    rng = random.Random("brick")
    shades: list[Rgb] = [(184, 78, 54), (170, 66, 46), (198, 92, 64)]
    for x, y in lattice(0.32, 0.155):
        tile.box(x - 0.32, y, x - 0.032, y + 0.122, rng.choice(shades))
    return tile


def _checkerboard(unit: float) -> Tile:
    tile = Tile(unit, (250, 250, 250))
    step = 0.145
    for r in range(15):
        for c in range(15):
            if (r + c) % 2:
                tile.box(c * step, r * step, (c + 1) * step, (r + 1) * step, (30, 30, 36))
    return tile


def _polka_dot(unit: float) -> Tile:
    tile = Tile(unit, (36, 92, 178))
    for x, y in lattice(0.24, 0.17):
        tile.ellipse(x, y, 0.066, 0.066, (255, 255, 255))
    return tile


def _galaxy(unit: float) -> Tile:
    tile = Tile(unit, (30, 18, 74))
    rng = random.Random("galaxy")
    clouds: list[Rgb] = [(150, 40, 160), (40, 70, 190), (214, 70, 150), (70, 30, 130)]
    for x, y in lattice(0.5, 0.3):
        tile.ellipse(x + rng.uniform(-0.1, 0.1), y, 0.2, 0.13, rng.choice(clouds))
    blur = ImageFilter.GaussianBlur(0.06 * tile.scale)
    tile.image = tile.image.filter(blur)
    tile.canvas = ImageDraw.Draw(tile.image)
    for x, y in lattice(0.27, 0.2):
        x, y, r = x + rng.uniform(-0.07, 0.07), y + rng.uniform(-0.05, 0.05), rng.choice((1, 1, 2))
        if r == 1:
            tile.ellipse(x, y, 0.028, 0.028, (255, 250, 230))
        else:
            spokes = [(0.085 if i % 2 == 0 else 0.027, i * math.pi / 4) for i in range(8)]
            spark = [(x + d * math.cos(a), y + d * math.sin(a)) for d, a in spokes]
            tile.polygon(spark, (255, 255, 255))
    return tile


def _wood(unit: float) -> Tile:
    tile = Tile(unit, (206, 148, 88))
    xs = [REACH * i / 60 for i in range(61)]
    for k in range(16):

        def grain(x: float, k: int = k) -> float:
            return k * 0.13 + 0.022 * math.sin(4.4 * x + 0.9 * k) + 0.012 * math.sin(9 * x)

        band = [(x, grain(x)) for x in xs]
        band += [(x, grain(x) + 0.042 + 0.015 * math.sin(3 * x + k)) for x in reversed(xs)]
        tile.polygon(band, (150, 94, 48))
    for x, y in lattice(0.9, 0.52):
        tile.ellipse(x + 0.3, y + 0.2, 0.13, 0.085, (150, 94, 48))
        tile.ellipse(x + 0.3, y + 0.2, 0.1, 0.06, (206, 148, 88))
        tile.ellipse(x + 0.3, y + 0.2, 0.06, 0.032, (118, 70, 34))
    return tile


def _gold(unit: float) -> Tile:
    tile = Tile(unit, (236, 180, 40))
    side = tile.image.width
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / tile.scale
    phase = ((x + 0.7 * y) / 0.52) % 1.0
    at = [0.0, 0.16, 0.3, 0.38, 0.46, 0.66, 0.84, 1.0]
    stops = np.array([(150, 96, 8), (206, 144, 20), (252, 212, 84), (255, 252, 214),
                      (252, 212, 84), (222, 164, 28), (176, 116, 10), (150, 96, 8)])  # fmt: skip
    bands = [np.interp(phase, at, stops[:, c]) for c in range(3)]
    tile.image = Image.fromarray(np.stack(bands, -1).astype(np.uint8))
    return tile


def _knitted(unit: float) -> Tile:
    tile = Tile(unit, (126, 74, 104))
    w, h = 0.1, 0.13
    for c in range(-1, 12):
        for r in range(-2, 17):
            x, y = c * 2 * w, r * h
            for side in (-1, 1):  # one stitch is a V of two slanted loops
                loop = [(x + side * 0.012, y + h), (x + side * 0.012, y + 0.34 * h)]
                loop += [(x + side * 0.92 * w, y - 0.72 * h), (x + side * 0.92 * w, y - 0.06 * h)]
                tile.polygon(loop, (236, 182, 202))
    return tile


def _rainbow(unit: float) -> Tile:
    tile = Tile(unit, (255, 255, 255))
    bands: list[Rgb] = [(226, 44, 48), (250, 146, 30), (254, 222, 50), (58, 176, 78),
                        (44, 110, 220), (134, 62, 186)]  # fmt: skip
    for k in range(16):
        tile.box(0, k * 0.135, REACH, (k + 1) * 0.135, bands[k % 6])
    return tile


def _candy_cane(unit: float) -> Tile:
    tile = Tile(unit, (255, 252, 250))
    for k in range(-10, 11):
        x = k * 0.24
        stripe = [(x, 0.0), (x + 0.125, 0.0), (x + 0.125 + REACH, REACH), (x + REACH, REACH)]
        tile.polygon(stripe, (226, 30, 48))
    return tile


def _strawberry(unit: float) -> Tile:
    tile = Tile(unit, (224, 34, 58))
    for x, y in lattice(0.24, 0.16):
        tile.ellipse(x, y, 0.036, 0.052, (150, 10, 36))
        tile.ellipse(x, y - 0.004, 0.028, 0.044, (255, 224, 110))
    return tile


_TILES: dict[str, Callable[[float], Tile]] = {
    "strawberry": _strawberry,
    "zebra": _zebra,
    "tiger": _tiger,
    "leopard": _leopard,
    "brick": _brick,
    "checkerboard": _checkerboard,
    "polka dot": _polka_dot,
    "galaxy": _galaxy,
    "wood": _wood,
    "gold": _gold,
    "knitted": _knitted,
    "rainbow": _rainbow,
    "candy cane": _candy_cane,
    **materials.PAINTERS,
}


@lru_cache(maxsize=128)
def _tile(fill: str, width: int) -> Pixels:
    return _TILES[fill](width / SPAN).pixels()


def crop_tile(fill: str, width: int, seed: int) -> Pixels:
    """Return a [width, width, 3] crop of the fill's texture, at a position that `seed` selects."""
    tile = _tile(fill, width)
    slack = tile.shape[0] - width
    rng = random.Random(seed)
    top, left = int(rng.random() * slack), int(rng.random() * slack)
    return tile[top : top + width, left : left + width]
