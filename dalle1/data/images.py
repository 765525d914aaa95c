"""From Pillow's pictures to tensors and back, and the pictures that people look at."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(image: Image.Image) -> Tensor:
    """Give an RGB picture as [3, H, W], uint8."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def to_float(images: Tensor) -> Tensor:
    """Bring uint8 pictures to [0, 1]."""
    return images.float() / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    """Give pictures [B, 3, H, W] in [0, 1] as Pillow's."""
    pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """Cut the largest centred square and bring it to `size`, as the released code evaluates."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


def random_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """Cut a square of `size` anywhere, and mirror every second one.

    Raises: ValueError where the picture is smaller than that.
    """
    if min(image.size) < size:
        raise ValueError(
            f"a picture of {image.width} × {image.height} is too small to cut {size} × {size} "
            "from; resize it first, or cut less"
        )
    left = rng.randint(0, image.width - size)
    top = rng.randint(0, image.height - size)
    crop = image.crop((left, top, left + size, top + size))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Lay pictures of one size out in rows, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
