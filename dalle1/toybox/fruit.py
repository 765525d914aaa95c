"""Fruit fills, and a pizza: cut open, with a skin that follows the silhouette.

They depend on each pixel's depth inside the silhouette and on the centre of its widest part, the
heart. An avocado armchair so has a rind along its outline and a stone where it is widest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from dalle1.toybox.layers import Floats
from dalle1.toybox.pen import MARGIN, SPAN
from dalle1.toybox.tile import Pixels, Rgb

Stop = tuple[float, Rgb]

FRUIT: tuple[str, ...] = ("avocado", "watermelon", "kiwi", "lemon", "pizza")


def paint_fruit(fill: str, depth: Floats, heart: tuple[float, float], girth: float) -> Pixels:
    """Paint one fruit over a whole canvas.

    `depth` [w, w] is the distance to the silhouette's edge in object widths, `heart` the centre of
    the widest part in unit coordinates, and `girth` the depth there.
    """
    painter = {
        "avocado": _avocado,
        "watermelon": _watermelon,
        "kiwi": _kiwi,
        "lemon": _lemon,
        "pizza": _pizza,
    }
    # Slim shapes get a thinner skin, or nothing of the flesh would show.
    slim = min(max(girth / 0.26, 0.5), 1.0)
    return painter[fill](depth / slim, heart, girth)


def _layers(depth: Floats, stops: Sequence[Stop]) -> Floats:
    """Colour each pixel by its depth, straight between the stops."""
    at = [stop[0] for stop in stops]
    channels = [np.interp(depth, at, [stop[1][c] for stop in stops]) for c in range(3)]
    return np.stack(channels, -1).astype(np.float32)


def _polar(width: int, heart: tuple[float, float]) -> tuple[Floats, Floats]:
    """Return each pixel's distance from the heart, in object widths, and its angle."""
    y, x = np.mgrid[0:width, 0:width].astype(np.float32) * (SPAN / width) - MARGIN
    return np.hypot(x - heart[0], y - heart[1]), np.arctan2(y - heart[1], x - heart[0])


def _offsets(
    width: int, centre: tuple[float, float], radii: tuple[float, float]
) -> tuple[Floats, Floats]:
    """Return each pixel's offset from a centre, in radii of an ellipse."""
    y, x = np.mgrid[0:width, 0:width].astype(np.float32) * (SPAN / width) - MARGIN
    return (x - centre[0]) / radii[0], (y - centre[1]) / radii[1]


def _cover(signed: Floats, width: int) -> Floats:
    """Turn a signed distance in object widths into smooth coverage, 1 where positive."""
    return np.clip(signed * (width / SPAN) + 0.5, 0.0, 1.0)[..., None]


def _blend(under: Floats, colour: Rgb, cover: Floats) -> Floats:
    return under + (np.asarray(colour, np.float32) - under) * cover


def _finish(image: Floats) -> Pixels:
    return np.clip(image, 0, 255).astype(np.uint8)


def _avocado(depth: Floats, heart: tuple[float, float], girth: float) -> Pixels:
    width = depth.shape[0]
    skin, rind, flesh, core = (36, 52, 30), (112, 156, 52), (214, 224, 122), (240, 238, 172)
    image = _layers(
        depth, [(0.0, skin), (0.042, skin), (0.05, rind), (0.065, rind), (0.1, flesh), (0.2, core)]
    )
    radius = min(max(0.58 * girth, 0.09), 0.2)
    far, _ = _polar(width, heart)
    image = _blend(image, (196, 168, 84), _cover(radius * 1.14 - far, width))
    image = _blend(image, (118, 68, 34), _cover(radius - far, width))
    shine = (heart[0] - 0.35 * radius, heart[1] - 0.35 * radius)
    near, _ = _polar(width, shine)
    return _finish(_blend(image, (190, 132, 84), _cover(0.3 * radius - near, width)))


def _seeds(positions: Sequence[tuple[float, float, float]], width: int, long: float) -> Floats:
    """Return the coverage of drop-shaped seeds at (x, y, angle) in unit coordinates."""
    scale = 4 * width / SPAN
    image = Image.new("L", (4 * width, 4 * width), 0)
    draw = ImageDraw.Draw(image)
    for x, y, angle in positions:
        dx, dy = math.cos(angle), math.sin(angle)
        shape = [(math.cos(t / 12 * math.tau), math.sin(t / 12 * math.tau)) for t in range(12)]
        drop = [
            ((x + MARGIN + long * (dx * a - 0.55 * dy * b)) * scale,
             (y + MARGIN + long * (dy * a + 0.55 * dx * b)) * scale)
            for a, b in shape
        ]  # fmt: skip
        draw.polygon(drop, fill=255)
    return (np.asarray(image.reduce(4), np.float32)[..., None] / 255).astype(np.float32)


def _watermelon(depth: Floats, heart: tuple[float, float], girth: float) -> Pixels:
    width = depth.shape[0]
    dark, light, pith, red = (22, 96, 46), (120, 196, 84), (232, 244, 206), (236, 58, 72)
    image = _layers(
        depth, [(0.0, dark), (0.07, dark), (0.078, pith), (0.092, pith), (0.102, red), (0.3, red)]
    )
    _, angle = _polar(width, heart)
    stripe = np.clip(np.sin(angle * 13) * 4, 0, 1)[..., None] * _cover(0.07 - depth, width)
    image = _blend(image, light, stripe)
    positions = []
    for row in range(-4, 5):
        for column in range(-4, 5):
            x = heart[0] + (column + 0.5 * (row % 2)) * 0.2
            y = heart[1] + row * 0.15
            i, j = (int((v + MARGIN) * width / SPAN) for v in (y, x))
            if 0 <= i < width and 0 <= j < width and depth[i, j] > 0.13:
                positions.append((x, y, math.pi / 2))
    return _finish(_blend(image, (34, 20, 24), _seeds(positions, width, 0.048)))


def _kiwi(depth: Floats, heart: tuple[float, float], girth: float) -> Pixels:
    width = depth.shape[0]
    skin, rind, green, bright = (116, 82, 44), (92, 150, 30), (112, 182, 40), (156, 214, 70)
    image = _layers(
        depth, [(0.0, skin), (0.045, skin), (0.053, rind), (0.08, green), (0.2, bright)]
    )
    far, _ = _polar(width, heart)
    core = min(max(0.4 * girth, 0.06), 0.14)
    image = _blend(image, (244, 248, 214), _cover(core - far, width))
    angles = [math.tau * k / 10 for k in range(10)]
    ring = core + 0.055
    positions = [(heart[0] + ring * math.cos(a), heart[1] + ring * math.sin(a), a) for a in angles]
    return _finish(_blend(image, (28, 24, 22), _seeds(positions, width, 0.036)))


def _lemon(depth: Floats, heart: tuple[float, float], girth: float) -> Pixels:
    width = depth.shape[0]
    peel, pith, pulp = (250, 200, 20), (255, 252, 230), (252, 232, 96)
    image = _layers(
        depth, [(0.0, peel), (0.045, peel), (0.053, pith), (0.085, pith), (0.093, pulp)]
    )
    far, angle = _polar(width, heart)
    # Distance to the nearest of the spokes that part the segments.
    step = math.tau / 9
    off = np.abs((angle + math.pi / 2 + step / 2) % step - step / 2)
    walls = _cover(0.016 - far * np.sin(off), width) * (depth > 0.09)[..., None]
    image = _blend(image, pith, walls)
    return _finish(_blend(image, pith, _cover(0.035 - far, width)))


def _pizza(depth: Floats, heart: tuple[float, float], girth: float) -> Pixels:
    width = depth.shape[0]
    dark, crust, sauce, cheese = (150, 92, 40), (222, 162, 88), (204, 60, 28), (254, 214, 106)
    image = _layers(
        depth,
        [(0.0, dark), (0.02, crust), (0.062, crust), (0.07, sauce), (0.088, sauce), (0.1, cheese)],
    )
    inner = _cover(depth - 0.088, width)
    for row in range(-5, 6):
        for column in range(-5, 6):
            x = heart[0] + (column + 0.5 * (row % 2)) * 0.25
            y = heart[1] + row * 0.19
            far, _ = _polar(width, (x, y))
            if (row + 2 * column) % 5 == 3:  # a leaf of basil
                leaf = np.hypot(*_offsets(width, (x, y), (0.062, 0.036))).astype(np.float32)
                image = _blend(image, (52, 132, 50), _cover((1 - leaf) * 0.036, width) * inner)
                continue
            image = _blend(image, (158, 30, 26), _cover(0.078 - far, width) * inner)
            image = _blend(image, (206, 58, 44), _cover(0.058 - far, width) * inner)
    return _finish(image)
