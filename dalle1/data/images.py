"""Read and write image files; convert to RGB and to tensors; crop, resize and tile images.

Every image file that this package reads is opened here.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from dalle1.data.image_metadata import without_metadata
from dalle1.data.skipped import BadSample
from dalle1.storage import atomic_path

MAX_PIXELS = 89_478_485
"""Largest image that is decoded: a quarter of a gigabyte, where Pillow begins to warn."""

MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
"""First bytes of the commonest formats."""

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO"),
    *("ICNS", "PCX", "DDS", "SGI", "SUN", "QOI", "PSD", "XBM", "XPM"),
)
"""Decoders of Pillow that are used: those of `IMAGE_SUFFIXES`, none that starts a program (EPS)."""

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the image upright."""

ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Entries of Pillow's `Image.info` that hold the orientation."""

ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
WHITE = 250
"""Least value of a pixel that counts as white in a painted mask; painting blurs its edges."""


def open_image(content: bytes, where: str) -> Image.Image:
    """Open an image; its pixels are decoded later, by `to_rgb`.

    Args:
        where: name of its file, for error messages.

    Raises: BadSample where it is no image, or larger than `MAX_PIXELS`.
    """
    if not content:
        raise BadSample("empty file", "the image's file is empty", where)
    limit = f"million pixels, expected at most {MAX_PIXELS / 1e6:.0f} million; make it smaller"
    try:
        image = _open(content)
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))  # Pillow does not tell the sides
        count = f"{int(found[0]) / 1e6:.0f}" if found else "many"
        raise BadSample("too many pixels", f"it has {count} {limit}", where) from error
    except UnidentifiedImageError as error:
        if not content.startswith(MAGIC):
            raise BadSample(
                "not an image", f"it begins {content[:12]!r}, as no image does", where
            ) from error
        raise BadSample("damaged image", "its header is damaged", where) from error
    except Exception as error:  # a damaged file may fail in any way
        raise BadSample("damaged image", f"its image is damaged: {error}", where) from error
    if (pixels := image.width * image.height) > MAX_PIXELS:
        why = f"{image.width} × {image.height} are {pixels / 1e6:.0f} {limit}"
        raise BadSample("too many pixels", why, where)
    return image


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=formats())
    except Image.DecompressionBombError:
        raise
    except Exception:  # Pillow rejects an image for some damage to its metadata
        if (pixels := without_metadata(content)) == content:
            raise
        return Image.open(io.BytesIO(pixels), formats=formats())


@cache
def formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that the installed Pillow has; before 11.3 it has no AVIF."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def load_image_file(path: Path) -> Image.Image:
    """Decode an image file in its own mode, upright; BadSample where it is no readable image."""
    return upright(open_image(path.read_bytes(), str(path)), str(path))


def read_image_file(path: Path) -> Image.Image:
    """Read an image file of any shape as RGB; BadSample where it is no readable image."""
    return to_rgb(open_image(path.read_bytes(), str(path)), str(path))


def escape_surrogates(text: str) -> str:
    """Return a text that UTF-8 can encode: half an emoji becomes an escape, such as \\ud83e."""
    return text.encode("utf-8", "backslashreplace").decode()


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG with texts by name; an interruption leaves the old file or the new one."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, escape_surrogates(text))
    with atomic_path(path) as partial:
        image.save(partial, "PNG", pnginfo=info)


def to_rgb(image: Image.Image, where: str = "") -> Image.Image:
    """Convert any image to RGB, upright by its EXIF orientation; transparent pixels become white.

    Grey of 16 or 32 bits is scaled to 8; see `_to_grey`.

    Args:
        where: name of its file, for error messages.

    Raises: BadSample where its pixels cannot be decoded.
    """
    image = upright(image, where)
    try:
        if image.mode.startswith(("I", "F")):
            return _to_grey(image).convert("RGB")
        if has_alpha(image):
            return _flatten(image, "white")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # also a mode such as LAB
        raise BadSample("damaged image", f"its image is damaged: {error}", where) from error


def upright(image: Image.Image, where: str = "") -> Image.Image:
    """Decode an image and turn it by its EXIF orientation; with damaged EXIF it stays as it is."""
    file = getattr(image, "fp", None)
    try:
        image.load()
    except Exception as error:  # a damaged file may fail in any way
        where = where or str(getattr(image, "filename", ""))
        repaired = _load_pixels(file)
        if repaired is None:
            raise BadSample("damaged image", f"its image is damaged: {error}", where) from error
        image = repaired
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # so may damaged metadata
        return image
    if not (isinstance(orientation, int) and orientation in TRANSPOSE):
        return image
    image = image.transpose(TRANSPOSE[orientation])
    for name in ORIENTATION_SOURCES:
        image.info.pop(name, None)
    return image


def _load_pixels(file: object) -> Image.Image | None:
    """Return a PNG or JPEG decoded without its metadata, which may be what is damaged, or None."""
    content = file.getvalue() if isinstance(file, io.BytesIO) else b""
    if (pixels := without_metadata(content)) == content:
        return None
    try:
        (image := Image.open(io.BytesIO(pixels), formats=formats())).load()
    except Exception:  # the pixels are damaged
        return None
    return image


def has_alpha(image: Image.Image) -> bool:
    """Whether an image may have transparent pixels."""
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return image.mode in ALPHA_MODES or palette.endswith("A") or "transparency" in image.info


def _to_rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _flatten(image: Image.Image, background: str) -> Image.Image:
    rgba = _to_rgba(image)
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba)
    return flat.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits to 8.

    The range of 16 bits is 0 to 65,535; Pillow scales a PGM of more than 8 bits to it. Numbers of
    32 bits, integer or float, do not tell theirs: it is the least of 1, 255, 65,535 and 2³² − 1
    that holds the largest of them.
    """
    values = np.nan_to_num(np.asarray(image, np.float32))
    is_16 = ";16" in image.mode or (image.format == "PPM" and image.mode == "I")
    ranges = (65_535,) if is_16 else (1, 255, 65_535)
    top = next((top for top in ranges if values.max() <= top), 2**32 - 1)
    return Image.fromarray(np.rint(values / (top / 255)).clip(0, 255).astype(np.uint8))


def mask_to_sample(mask: Image.Image) -> Tensor:
    """Return the pixels that a mask marks to be sampled again: [H, W], bool.

    These are the white ones. Where some pixels are fully transparent, these are marked instead, as
    in OpenAI's image editor, unless all others are white: someone painted on an empty layer.
    """
    mask = upright(mask)
    if has_alpha(mask):
        rgba = np.asarray(_to_rgba(mask))
        clear = rgba[..., 3] == 0
        if clear.all():
            raise ValueError(
                "the mask is all transparent, expected opaque parts to keep; erase only the parts "
                "to sample again"
            )
        if clear.any():
            painted = rgba[..., :3][~clear].min() >= WHITE
            parts = "white parts, not its transparent ones," if painted else "transparent parts"
            warnings.warn(f"the mask has transparency: its {parts} are sampled again", stacklevel=2)
            if not painted:
                return torch.from_numpy(clear)
        mask = _flatten(mask, "black")
    return to_float(to_tensor(to_rgb(mask))).mean(0) >= 0.5


def codes_to_sample(mask: Image.Image, image: Image.Image, grid_size: int) -> Tensor:
    """Return the codes of the central square that a mask marks: [W, W], bool.

    A code is marked as soon as any of its pixels is; see `mask_to_sample`.
    """
    marked, (image_width, height) = mask_to_sample(mask), upright(image).size
    if marked.shape != (height, image_width):
        raise ValueError(
            f"the mask has {marked.shape[1]} × {marked.shape[0]} pixels, the image "
            f"{image_width} × {height}; expected the same"
        )
    side = min(image_width, height)
    left, top = (image_width - side) // 2, (height - side) // 2
    square = marked[top : top + side, left : left + side].float()
    unknown = F.adaptive_max_pool2d(square[None], grid_size)[0] > 0
    if not unknown.any():
        raise ValueError(
            "the mask is all black, or marks nothing in the central square; paint the parts to "
            "sample white"
        )
    if unknown.all():
        warnings.warn("the mask marks all of the image: nothing of it is kept", stacklevel=3)
    return unknown


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to [3, H, W], uint8."""
    # Band by band, since to stack a view of [H, W, 3] takes longer than the crop itself.
    bands = bytearray().join(band.tobytes() for band in image.split())
    return torch.frombuffer(bands, dtype=torch.uint8).view(3, image.height, image.width)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to floats in [0, 1]."""
    return images.float() / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images [B, 3, H, W] in [0, 1] to Pillow's."""
    pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Tile images of one size in rows, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
