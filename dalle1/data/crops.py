"""Cut squares out of images: random ones to train on, the centre to evaluate on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from dalle1.data.skipped import BadSample


class TooSmall(BadSample):
    """An image is smaller than a model's input, and may not be enlarged."""

    def __init__(self, why: str) -> None:
        super().__init__("too small", why)

    def __reduce__(self) -> tuple[type[TooSmall], tuple[str]]:  # type: ignore[override]
        return TooSmall, (self.why,)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops of training images: a square is cut, resized, and cropped.

    The defaults are those of the dVAE (paper A.2, Listing 1); see also `FOR_TRANSFORMER`.
    """

    band: tuple[float, float] = (0.0, 1.0)
    """Range of the largest square's position, as shares of its slack: 0 is left or top, 1 the other
    end."""
    resize: tuple[float, float] = (1.125, 1.5)
    """Range of the resized square's side, in crop sides. The square is never enlarged."""
    flip: bool = True
    """Whether half of the crops are mirrored."""

    def __post_init__(self) -> None:
        if not 0 <= self.band[0] <= self.band[1] <= 1:
            raise ValueError(f"band is {self.band}, expected two rising numbers in [0, 1]")
        if not 1 <= self.resize[0] <= self.resize[1]:
            raise ValueError(f"resize is {self.resize}, expected two rising numbers, 1 or more")


FOR_TRANSFORMER = Augmentation(band=(3 / 8, 5 / 8), resize=(1.0, 1.125), flip=False)
"""The paper's Listing 2: closer to the whole image, and not mirrored, as there may be text."""

RANDOM_SQUARE = Augmentation(resize=(1.0, 1.0), flip=False)
"""CLIP's crops: the largest square, anywhere, and nothing else (Radford et al. 2021, §2.3)."""


ORIGINAL = "original_size"
"""Key in an image's `info` of the (height, width) in its file; it may be decoded smaller."""


def original_size(image: Image.Image) -> tuple[int, int]:
    """Return the (height, width) of an image in its file, or its own where it is of no file."""
    return image.info.get(ORIGINAL, (image.height, image.width))


@dataclass(frozen=True)
class Crop:
    """A square of an image that was scaled, and the corner where it lay, in scaled pixels."""

    image: Image.Image
    top: int
    left: int


def augmented(
    image: Image.Image,
    size: int,
    rng: random.Random,
    how: Augmentation,
    allow_upscale: bool = False,
) -> Image.Image:
    """Cut a square of `size` at random, as the paper's Listings 1 and 2 do at 256.

    Raises: TooSmall where the image is smaller than that, unless `allow_upscale`.
    """
    return random_crop(image, size, rng, how, allow_upscale).image


def random_crop(
    image: Image.Image,
    size: int,
    rng: random.Random,
    how: Augmentation,
    allow_upscale: bool = False,
) -> Crop:
    """Cut a square as `augmented` does, and return where it lay before it was mirrored."""
    refuse_small(image, size, allow_upscale)
    side = min(image.size)
    left, top = (_within(how.band, length - side, rng) for length in image.size)
    image = _square(image, left, top, side)
    low, high = (max(size, min(side, round(factor * size))) for factor in how.resize)
    image = _resized(image, rng.randint(low, high))
    inner_left, inner_top = (rng.randint(0, length - size) for length in image.size)
    crop = _square(image, inner_left, inner_top, size)
    if how.flip and rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = (round(length * image.width / side) for length in (left, top))
    return Crop(crop, top + inner_top, left + inner_left)


def centre_square(image: Image.Image, size: int, allow_upscale: bool = False) -> Image.Image:
    """Resize the short side to `size` and crop the centre, as the released code evaluates.

    Raises: TooSmall where the image is smaller than that, unless `allow_upscale`.
    """
    return centre_crop(image, size, allow_upscale).image


def centre_crop(image: Image.Image, size: int, allow_upscale: bool = False) -> Crop:
    """Cut the centre as `centre_square` does, and return where it lay."""
    refuse_small(image, size, allow_upscale)
    scale = size / min(image.size)
    if scale != 1:
        width, height = (round(scale * length) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (round((length - size) / 2) for length in image.size)
    return Crop(_square(image, left, top, size), top, left)


def refuse_small(image: Image.Image, size: int, allow_upscale: bool) -> None:
    """Raise TooSmall where an image is smaller than `size` × `size`, unless `allow_upscale`."""
    if min(image.size) < size and not allow_upscale:
        raise TooSmall(
            f"an image of {image.width} × {image.height} is smaller than {size} × {size}; "
            "--allow-upscale enlarges small images"
        )


def _within(band: tuple[float, float], slack: int, rng: random.Random) -> int:
    first, end = int(band[0] * slack), int(band[1] * (slack + 1))
    return rng.randrange(first, max(first + 1, end))


def _square(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    if image.size == (side, side):
        return image
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, side: int) -> Image.Image:
    if image.width == side:
        return image
    # The paper's AREA; to enlarge with it would only repeat pixels.
    kind = Image.Resampling.BOX if side < image.width else Image.Resampling.LANCZOS
    return image.resize((side, side), kind)
