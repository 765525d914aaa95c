"""Silhouettes of made things: furniture, vessels, vehicles, clothes.

Each function paints one noun with a `Pen` in the unit square: first the body, as large as the
shape allows because it carries the fill, then a few bold details.
"""

from __future__ import annotations

import math

from dalle1.toybox.pen import BLACK, BODY, DARK, GLASS, GLOW, HOLE, LINE, SHADE, Pen, arc, spline


def armchair(pen: Pen) -> None:
    pen.box(0.1, 0.8, 0.2, 0.98)
    pen.box(0.8, 0.8, 0.9, 0.98)
    pen.box(0.17, 0.02, 0.83, 0.8, 0.24)
    pen.box(0.01, 0.38, 0.27, 0.9, 0.12)
    pen.box(0.73, 0.38, 0.99, 0.9, 0.12)
    pen.box(0.15, 0.6, 0.85, 0.9, 0.03)
    pen.box(0.1, 0.9, 0.2, 0.98, 0, DARK)
    pen.box(0.8, 0.9, 0.9, 0.98, 0, DARK)
    pen.box(0.27, 0.75, 0.73, 0.9, 0.0, SHADE)
    pen.box(0.27, 0.6, 0.73, 0.75, 0.0, (255, 255, 255, 48))
    pen.stroke([(0.28, 0.75), (0.72, 0.75)], 0.022)
    pen.curve([(0.19, 0.39), (0.26, 0.44), (0.27, 0.52), (0.27, 0.89)], 0.026)
    pen.curve([(0.81, 0.39), (0.74, 0.44), (0.73, 0.52), (0.73, 0.89)], 0.026)
    pen.stroke([(0.28, 0.6), (0.72, 0.6)], 0.022)


def teapot(pen: Pen) -> None:
    pen.stroke(arc(0.78, 0.55, 0.17, 0.19, -95, 95), 0.085, BODY)
    pen.polygon([(0.3, 0.8), (0.0, 0.36), (0.15, 0.32), (0.38, 0.55)])
    pen.ellipse(0.49, 0.6, 0.34, 0.31)
    pen.box(0.32, 0.85, 0.66, 0.94, 0.03)
    pen.ellipse(0.49, 0.33, 0.21, 0.11)
    pen.ellipse(0.49, 0.18, 0.065, 0.065)
    pen.curve([(0.24, 0.42), (0.36, 0.36), (0.49, 0.345), (0.62, 0.36), (0.74, 0.42)], 0.026)
    pen.curve([(0.19, 0.44), (0.17, 0.56), (0.19, 0.68)], 0.024)
    pen.ellipse(0.49, 0.18, 0.065, 0.065, SHADE)
    pen.box(0.32, 0.88, 0.66, 0.94, 0.02, SHADE)


def lamp(pen: Pen) -> None:
    pen.polygon([(0.29, 0.03), (0.71, 0.03), (0.97, 0.6), (0.03, 0.6)])
    pen.box(0.45, 0.55, 0.55, 0.9)
    pen.box(0.26, 0.87, 0.74, 0.97, 0.05)
    pen.box(0.45, 0.6, 0.55, 0.88, 0, DARK)
    pen.box(0.26, 0.87, 0.74, 0.97, 0.05, DARK)
    pen.polygon([(0.29, 0.03), (0.71, 0.03), (0.735, 0.085), (0.265, 0.085)], SHADE)
    pen.polygon([(0.055, 0.545), (0.945, 0.545), (0.97, 0.6), (0.03, 0.6)], SHADE)
    pen.stroke([(0.73, 0.62), (0.73, 0.76)], 0.02, BODY)
    pen.ellipse(0.73, 0.77, 0.03, 0.03)


def mug(pen: Pen) -> None:
    pen.stroke(arc(0.7, 0.52, 0.23, 0.22, -90, 90), 0.1, BODY)
    pen.box(0.04, 0.1, 0.74, 0.95, 0.11)
    pen.box(0.04, 0.1, 0.74, 0.5, 0.02)
    pen.ellipse(0.39, 0.12, 0.35, 0.085)
    pen.ellipse(0.39, 0.125, 0.345, 0.08, GLOW)
    pen.ellipse(0.39, 0.13, 0.285, 0.052, BLACK)
    pen.curve([(0.75, 0.2), (0.76, 0.5), (0.74, 0.82)], 0.022)


def clock(pen: Pen) -> None:
    pen.ellipse(0.24, 0.11, 0.13, 0.1)
    pen.ellipse(0.76, 0.11, 0.13, 0.1)
    pen.polygon([(0.2, 0.97), (0.3, 0.97), (0.42, 0.8), (0.28, 0.78)])
    pen.polygon([(0.8, 0.97), (0.7, 0.97), (0.58, 0.8), (0.72, 0.78)])
    pen.ellipse(0.5, 0.52, 0.43, 0.42)
    pen.ellipse(0.5, 0.52, 0.25, 0.245, LINE)
    pen.ellipse(0.5, 0.52, 0.23, 0.225, GLASS)
    for angle in range(0, 360, 90):
        x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        pen.ellipse(0.5 + 0.18 * x, 0.52 + 0.18 * y, 0.02, 0.02, BLACK)
    pen.stroke([(0.5, 0.52), (0.5, 0.37)], 0.032, BLACK)
    pen.stroke([(0.5, 0.52), (0.61, 0.58)], 0.032, BLACK)
    pen.ellipse(0.24, 0.11, 0.13, 0.1, SHADE)
    pen.ellipse(0.76, 0.11, 0.13, 0.1, SHADE)


def handbag(pen: Pen) -> None:
    pen.stroke(arc(0.5, 0.36, 0.25, 0.29, 180, 360), 0.085, BODY)
    pen.polygon([(0.12, 0.34), (0.88, 0.34), (0.99, 0.9), (0.01, 0.9)])
    pen.box(0.01, 0.8, 0.99, 0.97, 0.07)
    pen.polygon([(0.12, 0.34), (0.88, 0.34), (0.9, 0.45), (0.1, 0.45)], SHADE)
    pen.curve([(0.1, 0.45), (0.5, 0.47), (0.9, 0.45)], 0.024)
    pen.box(0.44, 0.41, 0.56, 0.55, 0.02, LINE)
    pen.box(0.465, 0.435, 0.535, 0.525, 0.02, GLASS)


def house(pen: Pen) -> None:
    pen.box(0.7, 0.06, 0.82, 0.4)
    pen.polygon([(0.5, 0.02), (1.0, 0.47), (0.0, 0.47)])
    pen.box(0.1, 0.42, 0.9, 0.97)
    pen.polygon([(0.5, 0.02), (1.0, 0.47), (0.0, 0.47)], DARK)
    pen.box(0.7, 0.06, 0.82, 0.15, 0, DARK)
    pen.box(0.42, 0.64, 0.61, 0.97, 0.02, BLACK)
    pen.ellipse(0.57, 0.81, 0.018, 0.018, GLASS)
    for x in (0.18, 0.69):
        pen.box(x - 0.015, 0.565, x + 0.155, 0.735, 0.015, LINE)
        pen.box(x, 0.58, x + 0.14, 0.72, 0.01, GLASS)


def car(pen: Pen) -> None:
    pen.smooth([(0.14, 0.5), (0.27, 0.25), (0.42, 0.2), (0.6, 0.21), (0.74, 0.32), (0.85, 0.5)])
    pen.box(0.0, 0.44, 1.0, 0.74, 0.1)
    for x in (0.23, 0.77):
        pen.ellipse(x, 0.73, 0.135, 0.135)
        pen.ellipse(x, 0.73, 0.135, 0.135, BLACK)
        pen.ellipse(x, 0.73, 0.06, 0.06, GLASS)
    pen.polygon([(0.24, 0.44), (0.31, 0.31), (0.46, 0.275), (0.46, 0.44)], GLASS)
    pen.polygon([(0.51, 0.275), (0.61, 0.285), (0.69, 0.35), (0.75, 0.44), (0.51, 0.44)], GLASS)
    pen.stroke([(0.485, 0.48), (0.485, 0.68)], 0.02)
    pen.box(0.55, 0.51, 0.63, 0.54, 0.01, LINE)
    pen.ellipse(0.955, 0.54, 0.035, 0.045, GLASS)


def cube(pen: Pen) -> None:
    top, right, bottom, left = (0.5, 0.0), (0.94, 0.23), (0.5, 0.99), (0.06, 0.23)
    low_right, low_left, near = (0.94, 0.76), (0.06, 0.76), (0.5, 0.46)
    pen.polygon([top, right, low_right, bottom, low_left, left])
    pen.polygon([top, right, near, left], GLOW)
    pen.polygon([right, low_right, bottom, near], DARK)
    pen.stroke([left, near, right], 0.018)
    pen.stroke([near, bottom], 0.018)


def ball(pen: Pen) -> None:
    pen.ellipse(0.5, 0.5, 0.48, 0.48)
    pen.ellipse(0.33, 0.27, 0.11, 0.075, (255, 255, 255, 130))


def boat(pen: Pen) -> None:
    pen.polygon([(0.0, 0.68), (1.0, 0.68), (0.82, 0.95), (0.18, 0.95)])
    pen.box(0.465, 0.02, 0.525, 0.7)
    pen.polygon([(0.545, 0.04), (0.97, 0.61), (0.545, 0.61)])
    pen.polygon([(0.445, 0.14), (0.445, 0.61), (0.07, 0.61)])
    pen.polygon([(0.0, 0.68), (1.0, 0.68), (0.95, 0.755), (0.05, 0.755)], DARK)
    pen.box(0.465, 0.02, 0.525, 0.68, 0, LINE)


def guitar(pen: Pen) -> None:
    pen.box(0.42, 0.02, 0.58, 0.15, 0.03)
    pen.box(0.455, 0.1, 0.545, 0.5)
    half = [(0.5, 0.36), (0.66, 0.37), (0.74, 0.46), (0.69, 0.57), (0.8, 0.68), (0.83, 0.82)]
    half += [(0.71, 0.95), (0.5, 0.985)]
    pen.smooth(half + [(1 - x, y) for x, y in half[-2:0:-1]])
    pen.box(0.455, 0.15, 0.545, 0.5, 0, LINE)
    pen.ellipse(0.5, 0.58, 0.095, 0.095, BLACK)
    pen.box(0.38, 0.8, 0.62, 0.85, 0.01, BLACK)
    pen.stroke([(0.48, 0.1), (0.48, 0.8)], 0.012, GLASS)
    pen.stroke([(0.52, 0.1), (0.52, 0.8)], 0.012, GLASS)


def hat(pen: Pen) -> None:
    pen.ellipse(0.5, 0.78, 0.5, 0.15)
    pen.smooth([(0.2, 0.78), (0.24, 0.3), (0.4, 0.14), (0.5, 0.18), (0.6, 0.14), (0.76, 0.3),
                (0.8, 0.78), (0.5, 0.85)])  # fmt: skip
    band = [(0.215, 0.6), (0.5, 0.67), (0.785, 0.6), (0.8, 0.74), (0.5, 0.82), (0.2, 0.74)]
    pen.polygon(band, LINE)


def shoe(pen: Pen) -> None:
    pen.smooth([(0.03, 0.3), (0.13, 0.24), (0.28, 0.27), (0.42, 0.25), (0.55, 0.42), (0.76, 0.53),
                (0.96, 0.62), (0.99, 0.76), (0.9, 0.82), (0.5, 0.82), (0.06, 0.82),
                (0.02, 0.6)])  # fmt: skip
    pen.box(0.01, 0.75, 1.0, 0.88, 0.06)
    pen.box(0.01, 0.775, 1.0, 0.88, 0.06, GLASS)
    pen.stroke([(0.03, 0.77), (0.98, 0.77)], 0.02)
    for x, y in ((0.42, 0.36), (0.5, 0.44), (0.59, 0.5)):
        pen.stroke([(x - 0.08, y + 0.07), (x + 0.03, y - 0.03)], 0.034, GLASS)
    pen.curve([(0.04, 0.33), (0.2, 0.38), (0.4, 0.3)], 0.022)


def rocket(pen: Pen) -> None:
    pen.polygon([(0.3, 0.55), (0.08, 0.76), (0.08, 0.92), (0.34, 0.82)])
    pen.polygon([(0.7, 0.55), (0.92, 0.76), (0.92, 0.92), (0.66, 0.82)])
    pen.smooth([(0.5, 0.0), (0.66, 0.15), (0.74, 0.42), (0.7, 0.7), (0.62, 0.86), (0.38, 0.86),
                (0.3, 0.7), (0.26, 0.42), (0.34, 0.15)])  # fmt: skip
    pen.box(0.38, 0.84, 0.62, 0.97, 0.02)
    pen.box(0.38, 0.87, 0.62, 0.97, 0.02, BLACK)
    pen.polygon([(0.28, 0.57), (0.08, 0.76), (0.08, 0.92), (0.33, 0.82)], DARK)
    pen.polygon([(0.72, 0.57), (0.92, 0.76), (0.92, 0.92), (0.67, 0.82)], DARK)
    pen.ellipse(0.5, 0.36, 0.115, 0.115, LINE)
    pen.ellipse(0.5, 0.36, 0.085, 0.085, GLASS)


def vase(pen: Pen) -> None:
    half = [(0.69, 0.04), (0.64, 0.18), (0.72, 0.32), (0.86, 0.5), (0.82, 0.72), (0.67, 0.9)]
    half += [(0.65, 0.97)]
    pen.polygon(half_curve(half) + mirrored(half_curve(half)))
    pen.box(0.27, 0.02, 0.73, 0.09, 0.03)
    pen.ellipse(0.5, 0.045, 0.19, 0.025, BLACK)
    pen.curve([(0.35, 0.2), (0.5, 0.225), (0.65, 0.2)], 0.024)
    pen.curve([(0.31, 0.9), (0.5, 0.92), (0.69, 0.9)], 0.024)


def bell(pen: Pen) -> None:
    pen.ellipse(0.5, 0.9, 0.11, 0.09)
    pen.ellipse(0.5, 0.09, 0.085, 0.085)
    half = [(0.5, 0.1), (0.7, 0.17), (0.78, 0.36), (0.83, 0.62), (0.96, 0.78)]
    pen.polygon(half_curve(half) + mirrored(half_curve(half)))
    pen.box(0.02, 0.76, 0.98, 0.87, 0.05)
    pen.ellipse(0.5, 0.91, 0.11, 0.08, DARK)
    pen.box(0.02, 0.76, 0.98, 0.87, 0.05, SHADE)
    pen.stroke([(0.08, 0.76), (0.92, 0.76)], 0.022)


def key(pen: Pen) -> None:
    pen.ellipse(0.28, 0.5, 0.27, 0.27)
    pen.box(0.45, 0.4, 1.0, 0.57, 0.03)
    pen.box(0.85, 0.5, 0.99, 0.8, 0.02)
    pen.box(0.65, 0.5, 0.78, 0.73, 0.02)
    pen.ellipse(0.22, 0.5, 0.1, 0.1, HOLE)


def umbrella(pen: Pen) -> None:
    pen.box(0.47, 0.5, 0.54, 0.88)
    pen.stroke(arc(0.42, 0.87, 0.085, 0.085, 0, 180), 0.07, BODY)
    pen.box(0.48, 0.0, 0.52, 0.1)
    pen.polygon(arc(0.5, 0.56, 0.5, 0.5, 180, 360))
    for x in (0.125, 0.375, 0.625, 0.875):
        pen.ellipse(x, 0.565, 0.125, 0.055, HOLE)
    pen.box(0.47, 0.5, 0.54, 0.6)
    pen.box(0.47, 0.53, 0.54, 0.88, 0, LINE)
    pen.stroke(arc(0.42, 0.87, 0.085, 0.085, 0, 180), 0.075, LINE)
    pen.curve([(0.5, 0.06), (0.32, 0.24), (0.25, 0.55)], 0.02)
    pen.curve([(0.5, 0.06), (0.68, 0.24), (0.75, 0.55)], 0.02)
    pen.stroke([(0.5, 0.06), (0.5, 0.53)], 0.02)


def crown(pen: Pen) -> None:
    pen.polygon([(0.02, 0.22), (0.26, 0.5), (0.5, 0.1), (0.74, 0.5), (0.98, 0.22), (0.9, 0.88),
                 (0.1, 0.88)])  # fmt: skip
    for x, y in ((0.05, 0.2), (0.5, 0.1), (0.95, 0.2)):
        pen.ellipse(x, y, 0.06, 0.06)
    pen.polygon([(0.085, 0.74), (0.915, 0.74), (0.9, 0.88), (0.1, 0.88)], DARK)
    for x in (0.27, 0.5, 0.73):
        pen.ellipse(x, 0.81, 0.042, 0.042, GLASS)


def bottle(pen: Pen) -> None:
    pen.box(0.39, 0.02, 0.61, 0.3, 0.02)
    half = [(0.59, 0.22), (0.6, 0.3), (0.7, 0.38), (0.76, 0.48), (0.76, 0.6)]
    pen.polygon(half_curve(half) + mirrored(half_curve(half)))
    pen.box(0.24, 0.48, 0.76, 0.98, 0.06)
    pen.box(0.37, 0.02, 0.63, 0.13, 0.02)
    pen.box(0.37, 0.02, 0.63, 0.13, 0.02, LINE)
    pen.box(0.3, 0.42, 0.36, 0.9, 0.03, GLOW)


def airplane(pen: Pen) -> None:
    pen.polygon([(0.02, 0.14), (0.16, 0.14), (0.32, 0.44), (0.08, 0.46)])
    pen.smooth([(0.02, 0.42), (0.2, 0.36), (0.56, 0.33), (0.84, 0.35), (0.99, 0.47), (0.88, 0.58),
                (0.56, 0.62), (0.16, 0.56)])  # fmt: skip
    wing = [(0.44, 0.5), (0.66, 0.5), (0.4, 0.92), (0.24, 0.92)]
    far = [(0.46, 0.38), (0.62, 0.36), (0.46, 0.08), (0.36, 0.08)]
    pen.polygon(wing)
    pen.polygon(far)
    pen.polygon(far, SHADE)
    pen.polygon(wing, DARK)
    pen.polygon([(0.02, 0.14), (0.16, 0.14), (0.21, 0.235), (0.04, 0.235)], DARK)
    pen.polygon([(0.82, 0.38), (0.9, 0.4), (0.945, 0.45), (0.82, 0.46)], GLASS)
    for x in (0.3, 0.41, 0.52, 0.63, 0.74):
        pen.ellipse(x, 0.43, 0.03, 0.033, GLASS)


def train(pen: Pen) -> None:
    pen.box(0.6, 0.1, 0.96, 0.74, 0.02)
    pen.box(0.54, 0.03, 1.0, 0.13, 0.03)
    pen.box(0.1, 0.36, 0.66, 0.72, 0.08)
    pen.polygon([(0.12, 0.08), (0.36, 0.08), (0.31, 0.38), (0.17, 0.38)])
    pen.ellipse(0.48, 0.36, 0.08, 0.1)
    pen.box(0.05, 0.66, 0.97, 0.8, 0.02)
    pen.polygon([(0.1, 0.7), (0.1, 0.93), (0.0, 0.93)])
    pen.polygon([(0.1, 0.7), (0.1, 0.93), (0.0, 0.93)], DARK)
    pen.box(0.05, 0.71, 0.97, 0.78, 0.0, DARK)
    pen.box(0.11, 0.07, 0.37, 0.15, 0.0, DARK)
    pen.box(0.54, 0.03, 1.0, 0.13, 0.03, SHADE)
    pen.box(0.68, 0.21, 0.88, 0.42, 0.02, LINE)
    pen.box(0.7, 0.23, 0.86, 0.4, 0.01, GLASS)
    for x in (0.26, 0.4):
        pen.stroke([(x, 0.4), (x, 0.68)], 0.022)
    for x, r in ((0.22, 0.11), (0.47, 0.11), (0.78, 0.16)):
        pen.ellipse(x, 0.97 - r, r, r)
        pen.ellipse(x, 0.97 - r, r, r, BLACK)
        pen.ellipse(x, 0.97 - r, r * 0.45, r * 0.45, GLASS)


def robot(pen: Pen) -> None:
    pen.stroke([(0.5, 0.16), (0.5, 0.06)], 0.04, BODY)
    pen.ellipse(0.5, 0.05, 0.05, 0.05)
    pen.ellipse(0.5, 0.05, 0.05, 0.05, (226, 40, 48, 240))
    pen.box(0.24, 0.13, 0.76, 0.45, 0.07)
    pen.box(0.17, 0.22, 0.83, 0.36, 0.02)
    pen.box(0.43, 0.42, 0.57, 0.52, 0)
    pen.box(0.21, 0.49, 0.79, 0.83, 0.05)
    for flip in (-1, 1):
        pen.stroke(
            [(0.5 + flip * 0.28, 0.55), (0.5 + flip * 0.41, 0.6), (0.5 + flip * 0.41, 0.72)],
            0.1,
            BODY,
        )
        pen.ellipse(0.5 + flip * 0.41, 0.75, 0.085, 0.075)
        pen.ellipse(0.5 + flip * 0.41, 0.75, 0.085, 0.075, DARK)
        x = 0.5 + flip * 0.15
        pen.box(x - 0.075, 0.8, x + 0.075, 0.98, 0.02)
        pen.box(x - 0.1, 0.91, x + 0.1, 0.99, 0.03)
        pen.box(x - 0.1, 0.91, x + 0.1, 0.99, 0.03, DARK)
        pen.box(0.5 + flip * 0.295 - 0.035, 0.22, 0.5 + flip * 0.295 + 0.035, 0.36, 0.02, DARK)
        pen.ellipse(0.5 + flip * 0.12, 0.25, 0.07, 0.07, GLASS)
        pen.ellipse(0.5 + flip * 0.12, 0.25, 0.038, 0.038, BLACK)
    pen.box(0.36, 0.355, 0.64, 0.415, 0.01, BLACK)
    for x in (0.43, 0.5, 0.57):
        pen.stroke([(x, 0.36), (x, 0.41)], 0.016, GLASS)
    pen.box(0.32, 0.56, 0.68, 0.76, 0.02, SHADE)
    for x, colour in (
        (0.4, (240, 60, 60, 240)),
        (0.5, (250, 210, 60, 240)),
        (0.6, (70, 190, 90, 240)),
    ):
        pen.ellipse(x, 0.66, 0.035, 0.035, colour)


def castle(pen: Pen) -> None:
    def tower(x0: float, x1: float, top: float, bottom: float) -> None:
        step = (x1 - x0) / 5
        pen.box(x0, top + 0.08, x1, bottom, 0)
        for k in (0, 2, 4):
            pen.box(x0 + k * step, top, x0 + (k + 1) * step, top + 0.09, 0)
        pen.stroke([(x0, top + 0.125), (x1, top + 0.125)], 0.022)

    tower(0.3, 0.7, 0.24, 0.97)
    tower(0.02, 0.34, 0.38, 0.97)
    tower(0.66, 0.98, 0.38, 0.97)
    pen.stroke([(0.5, 0.26), (0.5, 0.03)], 0.03, BODY)
    pen.stroke([(0.5, 0.23), (0.5, 0.03)], 0.034, BLACK)
    pen.polygon([(0.5, 0.02), (0.74, 0.09), (0.5, 0.16)])
    pen.polygon([(0.51, 0.02), (0.74, 0.09), (0.51, 0.16)], (226, 40, 48, 240))
    pen.polygon([*arc(0.5, 0.74, 0.13, 0.14, 180, 360), (0.63, 0.97), (0.37, 0.97)], BLACK)
    for x, y in ((0.18, 0.66), (0.82, 0.66), (0.5, 0.47)):
        pen.box(x - 0.045, y - 0.07, x + 0.045, y + 0.07, 0.04, BLACK)
    pen.stroke([(0.34, 0.52), (0.34, 0.96)], 0.02)
    pen.stroke([(0.66, 0.52), (0.66, 0.96)], 0.02)


def half_curve(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the smooth open curve of a symmetric shape's right half, from top to bottom."""
    return spline(points, closed=False)


def mirrored(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the left half that closes a right half, from bottom to top."""
    return [(1 - x, y) for x, y in reversed(points)]
