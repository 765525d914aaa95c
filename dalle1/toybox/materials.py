"""More tiles: stone, metal, cloth and food, made like those in `fills`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from dalle1.toybox.tile import REACH, Point, Rgb, Tile, lattice, polygon_around


def line(tile: Tile, points: list[Point], width: float, colour: Rgb) -> None:
    """Paint a line with round joints, `width` in object widths."""
    pixels = [(x * tile.scale, y * tile.scale) for x, y in points]
    tile.canvas.line(pixels, fill=colour, width=max(1, round(width * tile.scale)), joint="curve")


def _pineapple(unit: float) -> Tile:
    tile = Tile(unit, (255, 200, 44))
    step = 0.28
    for k in range(-8, 17):
        for turn in (-1, 1):
            start, stop = (k * step, 0.0), (k * step + turn * REACH, REACH)
            line(tile, [start, stop], 0.042, (152, 96, 20))
    for r in range(16):
        for c in range(9):
            x, y = (c + 0.5 * (r % 2)) * step, (r + 1) * step / 2
            tile.polygon(polygon_around(x, y - 0.014, 0.056, 3), (70, 122, 34))
    return tile


def _chocolate(unit: float) -> Tile:
    tile = Tile(unit, (56, 28, 14))
    step = 0.215
    for r in range(10):
        for c in range(10):
            x, y = c * step, r * step
            a, b = x + step - 0.022, y + step - 0.022
            tile.box(x, y, a, b, (150, 92, 54))
            tile.polygon([(a, y), (a, b), (x, b)], (74, 38, 20))
            tile.box(x + 0.04, y + 0.04, a - 0.04, b - 0.04, (108, 60, 32))
    return tile


def _marble(unit: float) -> Tile:
    tile = Tile(unit, (246, 244, 240))
    rng = random.Random("marble")
    xs = [REACH * i / 30 for i in range(31)]
    for k in range(-7, 9):
        shift, wave = rng.uniform(-0.05, 0.05), rng.uniform(3.0, 5.0)

        def vein(x: float, k: int = k, shift: float = shift, wave: float = wave) -> float:
            sway = 0.06 * math.sin(wave * x + 2.1 * k) + 0.025 * math.sin(11 * x + k)
            return k * 0.3 + 0.75 * x + shift + sway

        haze = [(x, vein(x) - 0.055) for x in xs] + [(x, vein(x) + 0.02) for x in reversed(xs)]
        tile.polygon(haze, (212, 214, 220))
        line(tile, [(x, vein(x)) for x in xs], 0.03, (120, 124, 138))
        for x in (rng.uniform(0, 0.6), rng.uniform(0.8, 1.2), rng.uniform(1.4, 1.9)):
            branch = [(x, vein(x)), (x + 0.1, vein(x) - 0.07), (x + 0.16, vein(x) - 0.2)]
            line(tile, branch, 0.02, (150, 152, 164))
    return tile


def _denim(unit: float) -> Tile:
    tile = Tile(unit, (58, 92, 150))
    for k in range(-16, 17):
        x = k * 0.14
        stripe = [(x, 0.0), (x + 0.06, 0.0), (x + 0.06 + REACH, REACH), (x + REACH, REACH)]
        tile.polygon(stripe, (82, 120, 178))
    for k in range(5):  # seams with a row of stitches on either side, along and across
        for upright in (True, False):
            at = 0.12 + k * 0.52

            def bar(a: float, b: float, c: float, d: float, colour: Rgb) -> None:
                tile.box(*((a, c, b, d) if upright else (c, a, d, b)), colour)  # noqa: B023

            bar(at - 0.012, at + 0.012, 0, REACH, (34, 56, 104))
            for s in range(20):
                for side in (-0.055, 0.055):
                    start = s * 0.1 + 0.02
                    bar(at + side - 0.014, at + side + 0.014, start, start + 0.062, (246, 176, 70))
    return tile


def _ice(unit: float) -> Tile:
    tile = Tile(unit, (176, 226, 248))
    rng = random.Random("ice")
    shades: list[Rgb] = [(156, 214, 244), (206, 240, 252), (232, 250, 255), (124, 192, 234)]
    step = 0.27
    many = math.ceil(REACH / step) + 2
    at = {
        (r, c): (
            (c - 0.5 + rng.uniform(-0.3, 0.3)) * step,
            (r - 0.5 + rng.uniform(-0.3, 0.3)) * step,
        )
        for r in range(many)
        for c in range(many)
    }
    for r in range(many - 1):
        for c in range(many - 1):
            a, b, d, e = at[r, c], at[r, c + 1], at[r + 1, c], at[r + 1, c + 1]
            for k, facet in enumerate(([a, b, d], [b, e, d])):
                tile.polygon(facet, shades[(r + 2 * c + 3 * k + rng.randrange(2)) % 4])
                line(tile, [*facet, facet[0]], 0.014, (248, 254, 255))
    return tile


def _ladybird(unit: float) -> Tile:
    tile = Tile(unit, (226, 36, 30))
    for x, y in lattice(0.32, 0.22):
        tile.ellipse(x, y, 0.09, 0.085, (24, 20, 26))
    return tile


def _peacock(unit: float) -> Tile:
    tile = Tile(unit, (10, 104, 96))
    for x, y in lattice(0.3, 0.22):
        for k in (-2, -1, 0, 1, 2):  # the barbs of the feather below its eye
            line(tile, [(x, y + 0.14), (x + k * 0.07, y - 0.02)], 0.016, (20, 142, 112))
        for rx, ry, dy, colour in (
            (0.118, 0.105, 0.0, (150, 186, 56)),
            (0.094, 0.084, 0.008, (206, 138, 46)),
            (0.07, 0.062, 0.014, (40, 190, 214)),
            (0.042, 0.038, 0.018, (26, 22, 116)),
        ):
            tile.ellipse(x, y + dy, rx, ry, colour)
    return tile


def _lava(unit: float) -> Tile:
    tile = Tile(unit, (255, 214, 70))
    rng = random.Random("lava")
    for x, y in lattice(0.3, 0.25):
        turn = rng.uniform(0, 1)
        spread = [rng.uniform(0.78, 1.1) for _ in range(7)]
        for radius, colour in (
            (0.178, (255, 122, 16)),
            (0.152, (176, 32, 14)),
            (0.132, (52, 36, 40)),
        ):
            corners = polygon_around(x, y, 1.0, 7, turn)
            plate = [
                (x + (a - x) * radius * s, y + (b - y) * radius * s)
                for (a, b), s in zip(corners, spread)
            ]
            tile.polygon(plate, colour)
    return tile


def _honeycomb(unit: float) -> Tile:
    tile = Tile(unit, (255, 224, 120))
    rng = random.Random("honeycomb")
    cells: list[Rgb] = [(226, 136, 16), (242, 164, 24), (196, 104, 10)]
    radius = 0.118
    for x, y in lattice(radius * math.sqrt(3), radius * 1.5):
        tile.polygon(polygon_around(x, y, radius * 0.84), rng.choice(cells))
        tile.ellipse(x - 0.025, y - 0.03, 0.024, 0.018, (255, 214, 110))
    return tile


def _silver(unit: float) -> Tile:
    tile = Tile(unit, (200, 204, 212))
    side = tile.image.width
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / tile.scale
    phase = ((y - 0.45 * x) / 0.42) % 1.0
    at = [0.0, 0.2, 0.36, 0.44, 0.5, 0.56, 0.8, 1.0]
    stops = np.array([(74, 82, 98), (140, 150, 166), (222, 228, 236), (255, 255, 255),
                      (236, 240, 246), (174, 182, 196), (108, 116, 134), (74, 82, 98)])  # fmt: skip
    bands = [np.interp(phase, at, stops[:, c]) for c in range(3)]
    tile.image = Image.fromarray(np.stack(bands, -1).astype(np.uint8))
    return tile


PAINTERS: dict[str, Callable[[float], Tile]] = {
    "pineapple": _pineapple,
    "chocolate": _chocolate,
    "marble": _marble,
    "denim": _denim,
    "ice": _ice,
    "ladybird": _ladybird,
    "peacock": _peacock,
    "lava": _lava,
    "honeycomb": _honeycomb,
    "silver": _silver,
}
