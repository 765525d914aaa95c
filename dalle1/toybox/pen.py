"""A pen that paints silhouettes and their inner details in unit coordinates.

A noun is painted inside the unit square, x to the right and y down. The pen keeps two layers: the
silhouette, which decides where the fill shows, and the ink, translucent darks and lights that are
laid over the fill so that the fill stays visible under every detail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from dalle1.toybox.tile import Point

Tone = tuple[int, int, int, int]

MARGIN = 0.1  # border around the unit square, needed for tilting
SPAN = 1 + 2 * MARGIN  # the canvas' width in units

BODY: Tone = (0, 0, 0, -1)  # adds to the silhouette
HOLE: Tone = (0, 0, 0, -2)  # cuts out of the silhouette
CLEAR: Tone = (0, 0, 0, 0)  # removes ink
SHADE: Tone = (20, 10, 30, 62)  # a part that lies in shadow
DARK: Tone = (20, 10, 30, 120)  # a part of darker material
LINE: Tone = (25, 15, 30, 165)  # seams and contours
BLACK: Tone = (38, 34, 44, 240)  # tyres, pupils, openings
GLOW: Tone = (255, 255, 255, 70)  # a part in the light
GLASS: Tone = (226, 242, 250, 225)  # windows, dials, eyes


def spline(points: Sequence[Point], closed: bool = True, steps: int = 10) -> list[Point]:
    """Return a smooth Catmull-Rom curve through `points`."""
    n = len(points)
    curve = []
    for i in range(n if closed else n - 1):
        if closed:
            a, b, c, d = (points[(i + k) % n] for k in (-1, 0, 1, 2))
        else:
            a, b, c, d = (points[min(max(i + k, 0), n - 1)] for k in (-1, 0, 1, 2))
        for step in range(steps):
            t = step / steps
            wa, wb = -t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3
            wc, wd = t + 4 * t**2 - 3 * t**3, t**3 - t**2
            x = (wa * a[0] + wb * b[0] + wc * c[0] + wd * d[0]) / 2
            y = (wa * a[1] + wb * b[1] + wc * c[1] + wd * d[1]) / 2
            curve.append((x, y))
    if not closed:
        curve.append(points[-1])
    return curve


def arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float) -> list[Point]:
    """Return points along an ellipse from `start` to `stop` degrees, clockwise from the right."""
    angles = [math.radians(start + (stop - start) * i / 32) for i in range(33)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


class Pen:
    """Paint one noun at `width` pixels, oversampled, on a silhouette layer and an ink layer."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.oversample = 4 if width <= 240 else 2
        full = width * self.oversample
        self.scale = full / SPAN
        self._mask = Image.new("L", (full, full), 0)
        self._ink = Image.new("RGBA", (full, full), CLEAR)
        self._on_mask = ImageDraw.Draw(self._mask)
        self._on_ink = ImageDraw.Draw(self._ink)

    def polygon(self, points: Sequence[Point], tone: Tone = BODY) -> None:
        """Fill a polygon."""
        draw, value = self._layer(tone)
        draw.polygon(self._pixels(points), fill=value)

    def smooth(self, points: Sequence[Point], tone: Tone = BODY) -> None:
        """Fill the smooth closed shape through `points`."""
        self.polygon(spline(points), tone)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, tone: Tone = BODY) -> None:
        """Fill an ellipse by centre and radii."""
        draw, value = self._layer(tone)
        draw.ellipse(self._pixels([(cx - rx, cy - ry), (cx + rx, cy + ry)]), fill=value)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, radius: float = 0.02, tone: Tone = BODY
    ) -> None:
        """Fill a rectangle with round corners."""
        draw, value = self._layer(tone)
        corners = self._pixels([(x0, y0), (x1, y1)])
        draw.rounded_rectangle(corners, radius * self.scale, fill=value)

    def stroke(self, points: Sequence[Point], thickness: float, tone: Tone = LINE) -> None:
        """Paint a line with round ends along `points`."""
        draw, value = self._layer(tone)
        pixels = self._pixels(points)
        radius = thickness * self.scale / 2
        draw.line(pixels, fill=value, width=max(1, round(2 * radius)), joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value)

    def curve(self, points: Sequence[Point], thickness: float, tone: Tone = LINE) -> None:
        """Paint a smooth line through `points`."""
        self.stroke(spline(points, closed=False), thickness, tone)

    def eye(self, x: float, y: float, radius: float) -> None:
        """Paint a friendly eye."""
        self.ellipse(x, y, radius, radius, GLASS)
        self.ellipse(x + radius * 0.15, y, radius * 0.62, radius * 0.62, BLACK)

    def layers(self) -> tuple[Image.Image, Image.Image]:
        """Return the silhouette (mode L) and the ink (mode RGBA) at the pen's width."""
        return self._mask.reduce(self.oversample), self._ink.resize(
            (self.width, self.width), Image.Resampling.BOX
        )

    def _layer(self, tone: Tone) -> tuple[ImageDraw.ImageDraw, int | Tone]:
        if tone == BODY:
            return self._on_mask, 255
        if tone == HOLE:
            return self._on_mask, 0
        return self._on_ink, tone

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        return [((x + MARGIN) * self.scale, (y + MARGIN) * self.scale) for x, y in points]
