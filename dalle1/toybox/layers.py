"""The layers that every style is rendered from, and the blending of colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle1.toybox.tile import Rgb

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layers:
    """One scene, all [size, size]; the masks have mode L."""

    things: Image.Image  # RGB, on the style's background
    cover: Image.Image  # where the things are
    outline: Image.Image  # their contours
    details: Image.Image  # the lines inside
    tubes: Image.Image  # RGB: both kinds of lines in the colours of light, on black
    background: Rgb
    seed: int


def to_floats(mask: Image.Image) -> Floats:
    """Return a mask as values in 0..1."""
    return (np.asarray(mask, np.float32) / 255).astype(np.float32)


def mixed(under: Floats, colour: Rgb, cover: Floats) -> Image.Image:
    """Blend a colour over an image [size, size, 3] where `cover` [size, size] is 1."""
    return to_image(under + (np.asarray(colour, np.float32) - under) * cover[..., None])


def to_image(colours: Floats) -> Image.Image:
    """Convert [size, size, 3] in 0..255 to an RGB image."""
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
