"""Rendering: from a scene to an image, deterministic and fast enough for use during training.

Everything that does not depend on the single item is made once per noun and working width and
kept: silhouette, light and ink (a `Sprite`), textures, backgrounds, shadows. An item then
costs one multiplication, one addition and one reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from dalle1.toybox import nature, objects
from dalle1.toybox.fills import COLOUR_VALUES, crop_tile
from dalle1.toybox.fruit import FRUIT, paint_fruit
from dalle1.toybox.layers import Floats, Layers
from dalle1.toybox.neon import TUBES
from dalle1.toybox.pen import MARGIN, SPAN, Pen
from dalle1.toybox.scene import Item, Scene
from dalle1.toybox.styles import PAINTERS, PAPER
from dalle1.toybox.tile import Pixels, Rgb
from dalle1.toybox.vocabulary import NOUNS

BACKGROUND_VALUES: dict[str, Rgb] = {
    "mint": (206, 242, 222),
    "cream": (255, 246, 218),
    "sky": (204, 230, 252),
    "lavender": (226, 216, 248),
    "peach": (255, 224, 200),
    "grey": (224, 226, 230),
    "rose": (252, 214, 224),
    "sage": (218, 228, 204),
}

MIN_SIZE, MAX_SIZE = 16, 2048

# An item is composed at one of these widths and then reduced, so that few are ever cached.
_WIDTHS = (48, 72, 96, 144, 192, 288, 384, 576)

# Position of a fruit's heart, for nouns whose widest part does not look natural.
_HEARTS = {"armchair": (0.5, 0.33)}

_PAINT: dict[str, Callable[[Pen], None]] = {
    noun: getattr(objects, noun, None) or getattr(nature, noun) for noun in NOUNS
}


@dataclass(frozen=True)
class Sprite:
    """A noun's shape and light for any fill: colour = fill * gain + offset, inside the mask."""

    mask: Image.Image  # L, [w, w]
    gain: Floats  # [w, w, 1]
    offset: Floats  # [w, w, 3]
    foot: tuple[float, float, float]  # the shadow's centre and width, and the ground


def render(scene: Scene, size: int) -> Image.Image:
    """Render the scene as an RGB image of `size` x `size` pixels.

    The same scene and size always give the same pixels. `size` is at least 16.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(
            f"got size {size!r}, expected whole pixels from {MIN_SIZE} to {MAX_SIZE}: try 128"
        )
    if scene.style is not None:
        return PAINTERS[scene.style](_layers(scene, size))
    image = _background(scene.background, size).copy()
    for item in scene.items:
        _cast_shadow(image, item)
    for item in scene.items:
        _paste_item(image, item)
    return image


def _layers(scene: Scene, size: int) -> Layers:
    """Render the objects alone, and their contours and inner lines."""
    blank, ground = (size, size), BACKGROUND_VALUES[scene.background]
    things = Image.new("RGB", blank, PAPER if scene.style == "sketch" else ground)
    cover, outline, details = (Image.new("L", blank) for _ in range(3))
    tubes = Image.new("RGB", blank)
    for item in scene.items if scene.style == "sketch" else ():
        _cast_shadow(things, item)
    for item in scene.items:
        corner, mask = _paste_item(things, item)
        cover.paste(255, corner, mask)
        if scene.style == "pixel art":
            continue
        # Lines are about as wide in an image of small objects as in one of a large object.
        thickness = round(min(max(0.015 / item.extent, 0.02), 0.05), 2)
        inner, outer = _lines(item.noun, _working_width(mask.width), thickness)
        for colour, lines, layer in zip(
            reversed(TUBES[item.fill]), (inner, outer), (details, outline), strict=True
        ):
            lines = lines.resize(mask.size, Image.Resampling.BILINEAR)
            if item.tilt:
                lines = lines.rotate(item.tilt, Image.Resampling.BILINEAR)
            layer.paste(255, corner, lines)
            tubes.paste(colour, corner, lines)
    return Layers(things, cover, outline, details, tubes, ground, scene.items[0].seed)


@lru_cache(maxsize=32)
def _background(name: str, size: int) -> Image.Image:
    """Return a soft gradient, lighter in the upper left."""
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope = (ramp[:, None] * 0.7 + ramp[None, :] * 0.3)[..., None]
    colour = np.asarray(BACKGROUND_VALUES[name], np.float32)
    # Darken towards the colour's own hue rather than towards grey.
    deep = colour - (255 - colour) * 0.22 - 5
    light = colour + (255 - colour) * 0.35
    mixed = light + (deep - light) * (slope + 1) / 2
    return Image.fromarray(mixed.round().astype(np.uint8))


@lru_cache(maxsize=64)
def _shadow(width: int) -> Image.Image:
    """Return a blurred ellipse, twice as wide as high."""
    y, x = np.mgrid[0:64, 0:128].astype(np.float32)
    far = np.hypot((x - 63.5) / 63.5, (y - 31.5) / 31.5)
    soft = np.clip(1.0 - far, 0, 1)
    soft = soft * soft * (3 - 2 * soft)
    image = Image.fromarray((soft * 120).clip(0, 84).astype(np.uint8))
    return image.resize((width, max(2, width // 4)), Image.Resampling.BILINEAR)


def _cast_shadow(image: Image.Image, item: Item) -> None:
    size = image.width
    middle, breadth, bottom = _sprite(item.noun, _WIDTHS[0]).foot
    unit = item.extent * size
    centre = item.x * size + (middle - 0.5) * unit
    shade = _shadow(max(4, round(breadth * 1.25 * unit)))
    ground = item.y * size + (bottom - 0.5) * unit
    corner = round(centre - shade.width / 2), round(ground - shade.height * 0.55)
    image.paste((70, 62, 96), corner, shade)


def _working_width(target: int) -> int:
    return next((w for w in _WIDTHS if w >= 1.5 * target), _WIDTHS[-1])


def _paste_item(image: Image.Image, item: Item) -> tuple[tuple[int, int], Image.Image]:
    """Render an item into an image; return its corner there and its mask."""
    size = image.width
    target = max(4, round(item.extent * SPAN * size))
    width = _working_width(target)
    sprite = _sprite(item.noun, width)
    colours = np.multiply(_fill(item, width), sprite.gain, dtype=np.float32)
    colours += sprite.offset
    np.clip(colours, 0, 255, out=colours)
    body, mask = Image.fromarray(colours.astype(np.uint8)), sprite.mask
    if item.tilt:
        body = body.rotate(item.tilt, Image.Resampling.BILINEAR)
        mask = mask.rotate(item.tilt, Image.Resampling.BILINEAR)
    body = body.resize((target, target), Image.Resampling.BICUBIC)
    mask = mask.resize((target, target), Image.Resampling.BICUBIC)
    corner = round(item.x * size - target / 2), round(item.y * size - target / 2)
    image.paste(body, corner, mask)
    return corner, mask


def _fill(item: Item, width: int) -> Floats | Pixels:
    if item.fill in COLOUR_VALUES:
        return np.asarray(COLOUR_VALUES[item.fill], np.float32)
    if item.fill in FRUIT:
        return _fruit(item.fill, item.noun, width)
    return crop_tile(item.fill, width, item.seed)


@lru_cache(maxsize=256)
def _fruit(fill: str, noun: str, width: int) -> Pixels:
    depth = _depth(noun)
    image = Image.fromarray(depth).resize((width, width), Image.Resampling.BICUBIC)
    grid = depth.shape[0]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    widest = (column + 0.5) / grid * SPAN - MARGIN, (row + 0.5) / grid * SPAN - MARGIN
    heart = _HEARTS.get(noun, (float(widest[0]), float(widest[1])))
    x, y = (int((v + MARGIN) / SPAN * grid) for v in heart)
    deep = np.maximum(np.asarray(image, np.float32), 0)
    return paint_fruit(fill, deep, heart, girth=float(depth[y, x]))


@lru_cache(maxsize=len(NOUNS))
def _depth(noun: str) -> Floats:
    """Return each inner pixel's distance to the silhouette's edge, in object widths.

    Exact, by comparing with every edge pixel, on a small grid: the field is smooth, so it
    survives being enlarged.
    """
    grid = 144
    inside = np.asarray(_sprite(noun, grid).mask) > 127
    core = inside.copy()
    for axis in (0, 1):
        core &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
    edge = np.argwhere(inside & ~core).astype(np.float32)
    inner = np.argwhere(inside).astype(np.float32)
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab, one matrix product for all pairs
    squares = (inner**2).sum(1)[:, None] + (edge**2).sum(1)[None] - 2 * inner @ edge.T
    field: Floats = np.zeros((grid, grid), np.float32)
    field[inside] = np.sqrt(np.maximum(squares.min(1), 0)) + 0.5
    for axis in (0, 1):  # round off the staircase that the edge pixels make
        for _ in range(2):
            near = np.roll(field, 1, axis) + np.roll(field, -1, axis)
            field = (field / 2 + near / 4).astype(np.float32)
    return (field * (SPAN / grid)).astype(np.float32)


@lru_cache(maxsize=256)
def _sprite(noun: str, width: int) -> Sprite:
    """Paint a noun and compute its light."""
    pen = Pen(width)
    _PAINT[noun](pen)
    mask, ink = pen.layers()
    light, shine = _light(mask)
    inked = np.asarray(ink, np.float32)
    cover = inked[..., 3:] / 255
    offset = inked[..., :3] * cover * np.minimum(light, 1.05) + shine * (1 - cover)
    return Sprite(
        mask=mask,
        gain=(light * (1 - cover)).astype(np.float32),
        offset=offset.astype(np.float32),
        foot=_foot(np.asarray(mask) > 127),
    )


@lru_cache(maxsize=512)
def _lines(noun: str, width: int, thickness: float) -> tuple[Image.Image, Image.Image]:
    """Return the lines inside a noun and its contour, `thickness` in object widths, as masks."""
    pen = Pen(width)
    _PAINT[noun](pen)
    mask, ink = pen.layers()
    # The blurred silhouette is one half on the contour, and a thin part of it never gets far off.
    near = np.abs(_blurred(mask, thickness / SPAN / 2) - 0.5)
    contour = np.clip((0.36 - near) * 12, 0, 1)
    # Ink over grey: where its tone changes within a short way there is a line.
    tone = Image.alpha_composite(Image.new("RGBA", ink.size, (128, 128, 128, 255)), ink)
    grey = tone.convert("L")
    reach = max(1, round(0.3 * thickness * width / SPAN)) * 2 + 1
    change = np.asarray(grey.filter(ImageFilter.MaxFilter(reach)), np.int16) - np.asarray(
        grey.filter(ImageFilter.MinFilter(reach)), np.int16
    )
    inner = Image.fromarray(np.where(change > 18, 255, 0).astype(np.uint8))
    inner = inner.filter(ImageFilter.GaussianBlur(reach / 6))
    inside = np.asarray(mask, np.float32) / 255
    inner = Image.fromarray((np.asarray(inner, np.float32) * inside).astype(np.uint8))
    return inner, Image.fromarray((contour * 255).astype(np.uint8))


def _foot(inside: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """Return the shadow's centre, its width and the ground, in unit coordinates."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    base = np.flatnonzero(inside[int(rows[-1] - 0.12 * len(inside)) :].any(0))
    scale = SPAN / len(inside)
    centre = (base[0] + base[-1] + columns[0] + columns[-1]) / 4 * scale - MARGIN
    width = max(base[-1] - base[0], 0.55 * (columns[-1] - columns[0])) * scale
    return float(centre), float(width), float(rows[-1] * scale - MARGIN)


def _light(mask: Image.Image) -> tuple[Floats, Floats]:
    """Return the light as a gain and a shine: a lamp in the upper left, a dark outline."""
    width = mask.width
    ramp = np.linspace(0, 1, width, dtype=np.float32)
    gain = 1.12 - 0.24 * (0.45 * ramp[None, :] + 0.55 * ramp[:, None])
    # The blurred silhouette slopes like a pillow; its slope towards the lamp is the relief.
    slope_y, slope_x = np.gradient(_blurred(mask, 0.045))
    relief = np.clip((0.6 * slope_x + 0.8 * slope_y) * width * 0.045, -0.5, 0.5)
    gain = gain + 0.9 * np.minimum(relief, 0)
    outline = np.clip((0.90 - _blurred(mask, 0.014)) / 0.2 + 0.5, 0, 1)
    gain = gain * (1 - 0.36 * outline)
    shine = np.maximum(relief, 0) * 90 * (1 - outline)
    return gain[..., None].astype(np.float32), shine[..., None].astype(np.float32)


def _blurred(mask: Image.Image, radius: float) -> Floats:
    """Blur a mask by a radius in canvas widths, to 0..1."""
    soft = mask.filter(ImageFilter.GaussianBlur(radius * mask.width))
    return (np.asarray(soft, np.float32) / 255).astype(np.float32)
