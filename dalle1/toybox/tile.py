"""A tile: the canvas that a fill's texture is painted on, larger than the object it covers."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Point = tuple[float, float]
Rgb = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]

REACH = 2.0  # a tile's side in object widths; larger than SPAN, so that crops can vary


class Tile:
    """A canvas in object widths for painting one texture."""

    def __init__(self, unit: float, base: Rgb) -> None:
        self.scale = unit * 3  # three times oversampled
        self.side = round(REACH * unit)
        self.image = Image.new("RGB", (self.side * 3, self.side * 3), base)
        self.canvas = ImageDraw.Draw(self.image)

    def polygon(self, points: list[Point], colour: Rgb) -> None:
        """Fill a polygon."""
        self.canvas.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Rgb) -> None:
        """Fill an ellipse by centre and radii."""
        s = self.scale
        self.canvas.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Rgb) -> None:
        """Fill a rectangle."""
        s = self.scale
        self.canvas.rectangle((x0 * s, y0 * s, x1 * s, y1 * s), fill=colour)

    def pixels(self) -> Pixels:
        """Return the finished texture, [side, side, 3]."""
        return np.asarray(self.image.reduce(3))


def lattice(step_x: float, step_y: float) -> list[Point]:
    """Return the points of a grid over a tile, every second row shifted by half a step."""
    rows, columns = math.ceil(REACH / step_y) + 1, math.ceil(REACH / step_x) + 1
    return [((c + 0.5 * (r % 2)) * step_x, r * step_y) for r in range(rows) for c in range(columns)]


def polygon_around(
    x: float, y: float, radius: float, corners: int = 6, turn: float = 0.0
) -> list[Point]:
    """Return the corners of a regular polygon, starting at `turn` radians from straight up."""
    angles = [turn + math.tau * k / corners for k in range(corners)]
    return [(x + radius * math.sin(a), y - radius * math.cos(a)) for a in angles]
