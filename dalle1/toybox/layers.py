"""The layers that every style is made from, and how colours are laid over each other."""

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

    things: Image.Image  # RGB, on the style's ground
    cover: Image.Image  # where the things are
    outline: Image.Image  # their contours
    details: Image.Image  # the lines inside
    tubes: Image.Image  # RGB: both kinds of lines in the colours of light, on black
    background: Rgb
    seed: int


def to_floats(mask: Image.Image) -> Floats:
    """Bring a mask to 0..1."""
    return (np.asarray(mask, np.float32) / 255).astype(np.float32)


def mixed(under: Floats, colour: Rgb, cover: Floats) -> Image.Image:
    """Lay a colour over a picture [size, size, 3] where `cover` [size, size] is 1."""
    return to_picture(under + (np.asarray(colour, np.float32) - under) * cover[..., None])


def to_picture(colours: Floats) -> Image.Image:
    """Turn [size, size, 3] in 0..255 into an RGB picture."""
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
