"""Styles: the same scene as a pencil sketch, as pixel art, as a neon sign, as stained glass.

A style is a function of a few layers of the image: the rendered objects, their masks, contours and
inner lines. What depends on the image size alone (hatching, a wall, panes) is computed once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

from dalle1.toybox.layers import Floats, Layers, mixed, to_floats
from dalle1.toybox.neon import neon

PAPER, GRAPHITE = (250, 247, 240), (44, 44, 54)
LEAD = (22, 20, 26)

PIXELS = 64  # width of pixel art, at every image size


def sketch(layers: Layers) -> Image.Image:
    """Render a pencil sketch: contours, and hatching that is denser where the object is darker."""
    tone = np.clip(0.96 - to_floats(layers.things.convert("L")), 0, 1)
    first, second = _hatching(layers.things.width)
    dark = 0.2 * tone
    dark += 0.42 * np.clip((0.72 * tone - first) * 5, 0, 1)
    dark += 0.4 * np.clip((1.5 * tone - 0.84 - second) * 5, 0, 1)
    lines = np.maximum(0.95 * to_floats(layers.outline), 0.7 * to_floats(layers.details))
    return mixed(np.asarray(PAPER, np.float32), GRAPHITE, np.maximum(np.clip(dark, 0, 0.95), lines))


@lru_cache(maxsize=8)
def _hatching(size: int) -> tuple[Floats, Floats]:
    """Return two slants of strokes as thresholds in 0..1, low where a stroke runs first."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    waves = []
    for across, along, period in ((x + 0.8 * y, x - y, 0.043), (x - 1.1 * y, x + y, 0.047)):
        wobble = 0.006 * np.sin(9 * along + 3) + 0.003 * np.sin(23 * along)
        phase = ((across + wobble) / period) % 1.0
        waves.append(np.abs(2 * phase - 1).astype(np.float32))
    return waves[0], waves[1]


def pixel_art(layers: Layers) -> Image.Image:
    """Render a coarse grid of few colours, with a dark contour one pixel wide."""
    size = layers.things.width
    side = min(PIXELS, size)
    small = layers.things.resize((side, side), Image.Resampling.BOX)
    inside = np.asarray(layers.cover.resize((side, side), Image.Resampling.BOX)) > 110
    edge = inside.copy()
    edge[1:-1, 1:-1] &= ~(
        inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    )
    colours = np.asarray(small, np.float32)
    colours = np.where(inside[..., None], colours, np.asarray(layers.background, np.float32))
    colours = np.where(edge[..., None], 0.42 * colours, colours)
    few = (np.round(colours / 36.4) * 36.4).clip(0, 255).astype(np.uint8)
    return Image.fromarray(few).resize((size, size), Image.Resampling.NEAREST)


def stained_glass(layers: Layers) -> Image.Image:
    """Render the objects as panes between strips of lead, with rays behind them."""
    size = layers.things.width
    panes, pane_lead, rays, ray_lead = _panes(size, layers.seed % 4)
    cover = to_floats(layers.cover)
    things = np.asarray(layers.things, np.float32)
    grey = np.asarray(layers.things.convert("L"), np.float32)[..., None]
    glass = (grey + (things - grey) * 1.35) * panes[..., None] + 10
    tint = np.asarray(layers.background, np.float32)
    deep = tint - (255 - tint) * 1.5
    behind = deep + (tint - deep) * rays[..., None]
    colours = behind + (glass - behind) * cover[..., None]
    lead = np.where(cover > 0.5, pane_lead, ray_lead)
    lead = np.maximum(lead, np.maximum(to_floats(layers.outline), 0.4 * to_floats(layers.details)))
    return mixed(colours, LEAD, lead)


@lru_cache(maxsize=32)
def _panes(size: int, variant: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Return the light of the panes and their lead, and the same of the rays behind."""
    rng = random.Random(f"panes {variant}")
    many = 7
    centres = np.array(
        [((c + rng.uniform(0.1, 0.9)) / many, (r + rng.uniform(0.1, 0.9)) / many)
         for r in range(many) for c in range(many)], np.float32,
    )  # fmt: skip
    light = np.array([rng.uniform(0.8, 1.25) for _ in centres], np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    far = np.hypot(x[..., None] - centres[:, 0], y[..., None] - centres[:, 1])
    nearest = far.argmin(-1)
    two = np.partition(far, 1, -1)
    wide = 0.006
    soft = 1.2 / size
    lead = np.clip((wide + soft - (two[..., 1] - two[..., 0]) / 2) / soft, 0, 1)
    panes = light[nearest] * (1.08 - 1.4 * two[..., 0])
    offset, count = rng.uniform(0, 1), 14
    angle = (np.arctan2(y - 0.5, x - 0.5) / (2 * np.pi) + offset) % 1.0 * count
    distance = np.hypot(x - 0.5, y - 0.5)
    off = np.abs(angle - np.round(angle)) / count * 2 * np.pi * distance
    ring = np.abs(distance - 0.44)
    ray_lead = np.clip((wide + soft - np.minimum(off, ring)) / soft, 0, 1)
    edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    ray_lead = np.maximum(ray_lead, np.clip((0.014 - edge) * size, 0, 1))
    sector = np.floor(angle).astype(int) + count * (distance > 0.44)
    shades = np.array([rng.uniform(0.15, 0.95) for _ in range(2 * count + 2)], np.float32)
    rays = shades[sector] + 0.25 * (0.5 - distance)
    return (
        panes.astype(np.float32),
        lead.astype(np.float32),
        rays.astype(np.float32),
        ray_lead.astype(np.float32),
    )


PAINTERS: dict[str, Callable[[Layers], Image.Image]] = {
    "sketch": sketch,
    "pixel art": pixel_art,
    "neon": neon,
    "stained glass": stained_glass,
}
