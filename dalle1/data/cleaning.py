"""From a user's files to usable pictures and captions: what is taken, what is left out, and why."""

from __future__ import annotations

import html
import io
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dalle1.data.skipped import BadSample

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
CAPTIONS = (".txt", ".json")

MAX_PIXELS = 89_478_485
"""The largest picture that is decoded: a quarter of a gigabyte, where Pillow begins to warn."""

MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")
"""How the files of `PICTURES` begin."""


@dataclass(frozen=True, kw_only=True)
class CleaningConfig:
    """What of a user's data is taken, and how captions are cleaned. Toybox is taken as it is."""

    clean_captions: bool = True
    """Mend captions that were decoded wrongly (by ftfy), resolve HTML's entities, and make all
    white space single spaces."""
    min_side: int = 1
    """Leave out pictures with a shorter side of fewer pixels; see also allow_upscale."""
    max_aspect: float = 2.0
    """Leave out pictures whose longer side is more than so many times the shorter. Paper: 2."""
    min_caption: int = 1
    """Leave out captions of fewer characters."""
    max_caption: int = 10_000
    """Leave out captions of more characters."""
    max_bad_fraction: float = 0.05
    """Stop where a larger part of the last 1,000 pairs is damaged: then the data is wrong."""

    def __post_init__(self) -> None:
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect is {self.max_aspect}, expected at least 1")
        if not 1 <= self.min_caption <= self.max_caption:
            raise ValueError(
                f"min_caption is {self.min_caption} and max_caption {self.max_caption}, expected "
                "rising numbers of at least 1"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}, expected 0 to 1")


NO_CLEANING = CleaningConfig(clean_captions=False, max_aspect=float("inf"))
"""Everything that can be read at all, for what is to be judged rather than learned from."""


def read_image(content: bytes, where: str, reading: CleaningConfig, detail: int = 0) -> Image.Image:
    """Decode a picture to RGB.

    Args:
        where: what its file is called, for people.
        detail: pixels of the shorter side that suffice. A JPEG is decoded at the least of 1/8, 1/4
            and 1/2 of its size that has them (Pillow's draft mode); 0: at full size.

    Raises: BadSample where it is damaged, or not what `reading` takes.
    """
    if not content:
        raise BadSample("empty file", "the picture's file is empty", where)
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            why = f"{image.width} × {image.height}, more than {MAX_PIXELS / 1e6:.0f} million"
            raise BadSample("too many pixels", why, where)
        _refuse_by_shape(image.width, image.height, where, reading)
        if detail:
            image.draft(None, (detail, detail))
        return to_rgb(image)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels", str(error), where) from error
    except UnidentifiedImageError as error:
        if not content.startswith(MAGIC):
            raise BadSample("not a picture", f"it begins {content[:12]!r}", where) from error
        raise BadSample("damaged picture", "its head cannot be read", where) from error
    except Exception as error:  # a damaged file may fail in any way, down to its EXIF
        raise BadSample("damaged picture", f"{error}", where) from error


def _refuse_by_shape(width: int, height: int, where: str, reading: CleaningConfig) -> None:
    short, long, shape = min(width, height), max(width, height), f"{width} × {height}"
    if short < reading.min_side:
        raise BadSample("too small", f"{shape}, and --min-side is {reading.min_side}", where)
    if long > reading.max_aspect * short:
        why = f"{shape}, and --max-aspect is {reading.max_aspect:g}"
        raise BadSample("too elongated", why, where)


def to_rgb(image: Image.Image) -> Image.Image:
    """Make any picture RGB, the right way up; transparent places become white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would cut it off at 255
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def captions_in(content: bytes, suffix: str, where: str) -> list[str]:
    """Give the captions in a `.txt`, one a line, or a `.json`: a string, a list, or img2dataset's.

    Raises: BadSample where they cannot be read.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("caption not UTF-8", str(error), where) from error
    if suffix == ".txt":
        return text.splitlines()
    try:
        return as_captions(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise BadSample(
            "damaged captions", f"no JSON that is understood: {error}", where
        ) from error


def as_captions(found: Any) -> list[str]:
    """Give the captions of a JSON value: a string, a list, or an object with caption or captions.

    Raises: ValueError where it is something else.
    """
    if isinstance(found, dict):
        found = found.get("captions") or found.get("caption") or []
    if isinstance(found, str):
        return [found]
    if isinstance(found, list) and all(isinstance(text, str) for text in found):
        return found
    raise ValueError(f"expected a caption or a list of them, got {str(found)[:40]!r}")


def sample_caption(
    captions: Iterable[str], where: str, reading: CleaningConfig, rng: random.Random
) -> str:
    """Clean captions of one picture, and give one of those that `reading` takes, at random.

    Raises: BadSample where there is none.
    """
    given = [text.strip() for text in captions]
    given = [clean(text) for text in given] if reading.clean_captions else given
    given = [text for text in given if text]
    if not given:
        raise BadSample("no caption", "there is no text in it", where)
    taken = [c for c in given if reading.min_caption <= len(c) <= reading.max_caption]
    if taken:
        return rng.choice(taken)
    length = min(map(len, given))
    if length < reading.min_caption:
        why = f"{length} characters, and --min-caption is {reading.min_caption}"
        raise BadSample("caption too short", why, where)
    why = f"{length} characters, and --max-caption is {reading.max_caption}"
    raise BadSample("caption too long", why, where)


def clean(caption: str) -> str:
    """Mend a caption as CLIP's training does: wrongly decoded letters, entities, white space."""
    import ftfy

    # Twice, since much of the web is escaped twice.
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())
