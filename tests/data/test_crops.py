"""Where crops lie, and the size of the images that they are cut from."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from dalle1.data.cleaning import NO_CLEANING, read_image
from dalle1.data.crops import Augmentation, centre_crop, original_size, random_crop


def gradient(width: int, height: int) -> Image.Image:
    """Return an image whose every pixel names its position: red is x, green is y."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 77)], -1).astype(np.uint8))


@pytest.mark.parametrize("scale", [1, 2])
def test_random_crops_know_their_corner(scale: int) -> None:
    """The corner is in pixels of the scaled image, as SDXL counts it."""
    image, side = gradient(120, 80), 80 // scale
    corners = set()
    for seed in range(30):
        how = Augmentation(resize=(side / 16, side / 16), flip=False)
        crop = random_crop(image, 16, random.Random(seed), how)
        x, y, _ = crop.image.getpixel((0, 0))  # type: ignore[misc]
        assert crop.left * scale == pytest.approx(x, abs=scale)
        assert crop.top * scale == pytest.approx(y, abs=scale)
        corners.add((crop.top, crop.left))
    assert len(corners) > 20


def test_the_centre_knows_its_corner() -> None:
    crop = centre_crop(gradient(120, 80), 80)
    assert (crop.top, crop.left) == (0, 20)
    assert centre_crop(gradient(120, 80), 40).left == 10


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_original_size_is_that_of_the_file(orientation: int) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation  # 6: lies on its side
    Image.new("RGB", (640, 480), "red").save(file, "JPEG", exif=exif)
    upright = (480, 640) if orientation == 1 else (640, 480)
    for decode_size in (0, 64):
        image = read_image(file.getvalue(), "a.jpg", NO_CLEANING, decode_size)
        assert original_size(image) == upright
        assert (image.height < 480) == bool(decode_size)
    assert original_size(Image.new("RGB", (3, 2))) == (2, 3)
