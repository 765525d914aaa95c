"""Silhouettes of living things, and of the sky: animals, plants, star, heart, moon.

Drawn like `objects`, in the unit square with a `Pen`: a large body first, then bold details.
"""

from __future__ import annotations

import math

from dalle1.data.toybox.pen import BLACK, BODY, DARK, GLOW, HOLE, LINE, SHADE, Pen, arc, spline


def tree(pen: Pen) -> None:
    pen.box(0.42, 0.6, 0.58, 0.98, 0.02)
    for x, y, r in ((0.26, 0.5, 0.24), (0.74, 0.5, 0.24), (0.5, 0.27, 0.26), (0.5, 0.55, 0.22)):
        pen.ellipse(x, y, r, r)
    pen.box(0.42, 0.75, 0.58, 0.98, 0, (92, 56, 32, 235))
    pen.stroke(arc(0.27, 0.48, 0.16, 0.15, 30, 130), 0.022)
    pen.stroke(arc(0.7, 0.46, 0.16, 0.15, 40, 140), 0.022)
    pen.stroke(arc(0.47, 0.24, 0.15, 0.14, 40, 140), 0.022)


def fish(pen: Pen) -> None:
    pen.polygon([(0.32, 0.5), (0.0, 0.2), (0.05, 0.5), (0.0, 0.8)])
    pen.smooth([(0.34, 0.3), (0.5, 0.1), (0.7, 0.14), (0.72, 0.3)])
    pen.smooth([(0.42, 0.7), (0.5, 0.9), (0.64, 0.88), (0.66, 0.7)])
    pen.smooth([(0.17, 0.5), (0.36, 0.28), (0.62, 0.21), (0.86, 0.32), (0.99, 0.52), (0.86, 0.7),
                (0.62, 0.79), (0.36, 0.72)])  # fmt: skip
    pen.curve([(0.72, 0.27), (0.65, 0.5), (0.72, 0.73)], 0.026)
    pen.curve([(0.42, 0.46), (0.52, 0.52), (0.42, 0.6)], 0.026)
    pen.curve([(0.97, 0.57), (0.91, 0.6), (0.86, 0.58)], 0.022)
    pen.eye(0.83, 0.43, 0.06)


def cat(pen: Pen) -> None:
    pen.curve([(0.66, 0.9), (0.88, 0.88), (0.93, 0.7), (0.84, 0.56), (0.9, 0.46)], 0.1, BODY)
    pen.smooth([(0.5, 0.4), (0.66, 0.5), (0.76, 0.7), (0.76, 0.92), (0.62, 0.98), (0.3, 0.98),
                (0.15, 0.92), (0.15, 0.7), (0.28, 0.5)])  # fmt: skip
    pen.polygon([(0.14, 0.3), (0.13, 0.0), (0.4, 0.14)])
    pen.polygon([(0.76, 0.3), (0.77, 0.0), (0.5, 0.14)])
    pen.ellipse(0.45, 0.31, 0.34, 0.25)
    pen.polygon([(0.185, 0.17), (0.18, 0.075), (0.27, 0.12)], DARK)
    pen.polygon([(0.715, 0.17), (0.72, 0.075), (0.63, 0.12)], DARK)
    pen.eye(0.31, 0.29, 0.06)
    pen.eye(0.57, 0.29, 0.06)
    pen.polygon([(0.41, 0.37), (0.49, 0.37), (0.45, 0.415)], BLACK)
    pen.curve([(0.36, 0.44), (0.41, 0.46), (0.45, 0.42), (0.49, 0.46), (0.54, 0.44)], 0.018)
    pen.curve([(0.24, 0.53), (0.45, 0.58), (0.66, 0.53)], 0.022)
    pen.stroke([(0.38, 0.76), (0.38, 0.95)], 0.022)
    pen.stroke([(0.54, 0.76), (0.54, 0.95)], 0.022)


def snail(pen: Pen) -> None:
    pen.smooth([(0.02, 0.87), (0.2, 0.78), (0.6, 0.78), (0.72, 0.62), (0.74, 0.4), (0.86, 0.33),
                (0.97, 0.42), (0.95, 0.62), (0.86, 0.82), (0.7, 0.91), (0.3, 0.91)])  # fmt: skip
    pen.stroke([(0.82, 0.42), (0.76, 0.18)], 0.045, BODY)
    pen.stroke([(0.92, 0.42), (0.95, 0.18)], 0.045, BODY)
    pen.ellipse(0.76, 0.18, 0.045, 0.045)
    pen.ellipse(0.95, 0.18, 0.045, 0.045)
    pen.ellipse(0.42, 0.47, 0.37, 0.37)
    turns = [i / 60 for i in range(61)]
    spiral = [(0.42 + (0.35 * t + 0.01) * math.cos(13.2 * t + 1.4),
               0.47 + (0.35 * t + 0.01) * math.sin(13.2 * t + 1.4)) for t in turns]  # fmt: skip
    pen.stroke(spiral, 0.034)
    pen.ellipse(0.76, 0.18, 0.03, 0.03, BLACK)
    pen.ellipse(0.95, 0.18, 0.03, 0.03, BLACK)
    pen.curve([(0.95, 0.55), (0.91, 0.585), (0.86, 0.57)], 0.02)


def star(pen: Pen) -> None:
    points = []
    for i in range(10):
        radius = 0.53 if i % 2 == 0 else 0.25
        angle = math.radians(36 * i - 90)
        points.append((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)))
    pen.polygon(points)
    for i in range(0, 10, 2):
        pen.polygon([points[i], points[(i + 1) % 10], (0.5, 0.53)], SHADE)


def heart(pen: Pen) -> None:
    right = [(0.5, 0.22), (0.6, 0.09), (0.76, 0.05), (0.92, 0.13), (0.98, 0.31), (0.91, 0.53),
             (0.73, 0.75), (0.5, 0.97)]  # fmt: skip
    curve = spline(right, closed=False)
    pen.polygon(curve + [(1 - x, y) for x, y in reversed(curve)])
    pen.curve([(0.12, 0.36), (0.16, 0.24), (0.26, 0.17)], 0.06, (255, 255, 255, 120))


def bird(pen: Pen) -> None:
    pen.polygon([(0.86, 0.36), (1.0, 0.41), (0.86, 0.47)])
    pen.polygon([(0.3, 0.5), (0.0, 0.42), (0.02, 0.66), (0.3, 0.72)])
    pen.smooth([(0.64, 0.16), (0.8, 0.19), (0.9, 0.34), (0.87, 0.52), (0.8, 0.72), (0.58, 0.86),
                (0.34, 0.81), (0.19, 0.64), (0.26, 0.48), (0.44, 0.42), (0.5, 0.26)])  # fmt: skip
    pen.stroke([(0.46, 0.8), (0.46, 0.97)], 0.04, BODY)
    pen.stroke([(0.6, 0.8), (0.6, 0.97)], 0.04, BODY)
    pen.stroke([(0.46, 0.85), (0.46, 0.97)], 0.045, BLACK)
    pen.stroke([(0.6, 0.85), (0.6, 0.97)], 0.045, BLACK)
    pen.polygon([(0.87, 0.34), (1.0, 0.41), (0.87, 0.49)], BLACK)
    wing = [(0.68, 0.5), (0.62, 0.68), (0.46, 0.73), (0.24, 0.62), (0.4, 0.56), (0.52, 0.48)]
    pen.smooth(wing, SHADE)
    pen.curve([(0.68, 0.5), (0.62, 0.68), (0.46, 0.73), (0.24, 0.62)], 0.024)
    pen.eye(0.74, 0.34, 0.055)


def mushroom(pen: Pen) -> None:
    pen.smooth([(0.36, 0.5), (0.64, 0.5), (0.64, 0.75), (0.72, 0.93), (0.5, 0.98), (0.28, 0.93),
                (0.36, 0.75)])  # fmt: skip
    pen.polygon(arc(0.5, 0.54, 0.49, 0.51, 180, 360))
    pen.ellipse(0.5, 0.54, 0.49, 0.08)
    pen.box(0.3, 0.54, 0.7, 1.0, 0, GLOW)
    pen.polygon(arc(0.5, 0.54, 0.49, 0.08, 0, 180) + arc(0.5, 0.54, 0.49, 0.02, 180, 0), DARK)


def butterfly(pen: Pen) -> None:
    for flip in (False, True):

        def at(x: float, flip: bool = flip) -> float:
            return 1 - x if flip else x

        upper = [(0.5, 0.46), (0.6, 0.22), (0.82, 0.04), (0.99, 0.14), (0.96, 0.4), (0.76, 0.54)]
        lower = [(0.5, 0.5), (0.78, 0.54), (0.9, 0.7), (0.82, 0.92), (0.66, 0.94), (0.54, 0.74)]
        pen.smooth([(at(x), y) for x, y in upper])
        pen.smooth([(at(x), y) for x, y in lower])
        pen.curve([(at(0.52), 0.5), (at(0.68), 0.53), (at(0.84), 0.53)], 0.024)
        pen.curve([(at(0.5), 0.3), (at(0.55), 0.16), (at(0.62), 0.1)], 0.03, BODY)
        pen.curve([(at(0.5), 0.3), (at(0.55), 0.16), (at(0.62), 0.1)], 0.035, BLACK)
    pen.ellipse(0.5, 0.54, 0.05, 0.3)
    pen.ellipse(0.5, 0.54, 0.05, 0.3, BLACK)


def moon(pen: Pen) -> None:
    pen.ellipse(0.5, 0.5, 0.48, 0.48)
    pen.ellipse(0.79, 0.4, 0.36, 0.36, HOLE)
    pen.ellipse(0.22, 0.44, 0.055, 0.055, SHADE)
    pen.ellipse(0.36, 0.7, 0.075, 0.075, SHADE)
    pen.ellipse(0.62, 0.86, 0.045, 0.045, SHADE)


def cactus(pen: Pen) -> None:
    pen.stroke([(0.36, 0.6), (0.1, 0.6)], 0.15, BODY)
    pen.stroke([(0.12, 0.6), (0.12, 0.36)], 0.2, BODY)
    pen.stroke([(0.64, 0.48), (0.9, 0.48)], 0.15, BODY)
    pen.stroke([(0.88, 0.48), (0.88, 0.24)], 0.2, BODY)
    pen.box(0.31, 0.02, 0.69, 0.85, 0.19)
    pen.polygon([(0.2, 0.76), (0.8, 0.76), (0.72, 0.99), (0.28, 0.99)])
    pen.polygon([(0.2, 0.76), (0.8, 0.76), (0.72, 0.99), (0.28, 0.99)], DARK)
    pen.box(0.18, 0.74, 0.82, 0.82, 0.01, LINE)
    for x in (0.42, 0.58):
        pen.stroke([(x, 0.15), (x, 0.7)], 0.02, LINE)
