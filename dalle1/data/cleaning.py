"""Cleaning of a user's data: decode images, parse captions, and skip what does not qualify."""

from __future__ import annotations

import html
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dalle1.data.crops import ORIGINAL
from dalle1.data.images import open_image, to_rgb
from dalle1.data.skipped import BadSample
from dalle1.json_files import parse_json

# Not what Pillow only writes, hands to another program (.eps, .wmf), or has no decoder for (.mpg).
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif"),
    *(".jfif", ".jpe", ".mpo", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".tga", ".ico", ".icns", ".pcx", ".dds", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".qoi"),
    *(".psd", ".xbm", ".xpm"),
)
"""Images that Pillow reads; of two images with one name, the earlier is taken."""
CAPTIONS = (".txt", ".json")
CAPTION_KEYS = ("captions", "caption", "text", "prompt")
"""Keys of a JSON object that hold captions, the first that holds any."""

SURROGATE = re.compile("[\ud800-\udfff]")
BLANK_CATEGORIES = {"Cc", "Cf", "Zs", "Zl", "Zp"}
BLANK_LETTERS = set("\u034f\u115f\u1160\u2800\u3164\ufe0e\ufe0f\uffa0\ufffd")
"""Letters of other categories that show nothing: fillers, variation selectors, U+FFFD."""


@dataclass(frozen=True, kw_only=True)
class CleaningConfig:
    """Limits on a user's images and captions, and how captions are cleaned. Toybox ignores them."""

    clean_captions: bool = True
    """Whether captions are cleaned: ftfy repairs wrong decoding, HTML entities are resolved, and
    white space becomes single spaces."""
    min_side: int = 1
    """Minimum shorter side of an image in pixels; smaller images are skipped."""
    max_aspect: float = 2.0
    """Maximum ratio of an image's longer side to its shorter; others are skipped. Paper: 2."""
    min_caption: int = 1
    """Minimum length of a caption in characters; shorter captions are skipped."""
    max_caption: int = 10_000
    """Maximum length of a caption in characters; longer captions are skipped."""
    max_bad_fraction: float = 0.05
    """Maximum share of damaged pairs among the last 1,000; beyond it, the command stops."""

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
"""Accepts everything that can be read, for images that are evaluated rather than learned from."""


def read_image(
    content: bytes, where: str, cleaning: CleaningConfig, decode_size: int = 0
) -> Image.Image:
    """Decode an image to RGB.

    Args:
        where: name of its file, for error messages.
        decode_size: pixels of the shorter side that suffice. A JPEG is decoded at the least of 1/8,
            1/4 and 1/2 of its size that has them (Pillow's draft mode); 0: at full size.

    Raises: BadSample where it is damaged, or outside the limits of `cleaning`.
    """
    image = open_image(content, where)
    _refuse_by_shape(image.width, image.height, where, cleaning)
    short, long = sorted(image.size)
    if decode_size:
        image.draft(None, (decode_size, decode_size))
    found = to_rgb(image, where)
    found.info[ORIGINAL] = (long, short) if found.height > found.width else (short, long)
    return found


def _refuse_by_shape(width: int, height: int, where: str, cleaning: CleaningConfig) -> None:
    short, long, shape = min(width, height), max(width, height), f"{width} × {height}"
    if short < cleaning.min_side:
        raise BadSample("too small", f"{shape}, and --min-side is {cleaning.min_side}", where)
    if long > cleaning.max_aspect * short:
        why = f"{shape}, and --max-aspect is {cleaning.max_aspect:g}"
        raise BadSample("too elongated", why, where)


def captions_among(files: Mapping[str, bytes], where: str) -> list[str]:
    """Parse the captions of a sample by its files `.txt` and `.json`.

    Where both are there, the .json decides: img2dataset writes its one caption into both, and line
    breaks in it are no ends of captions. A .json that holds none, or one of the lines of the .txt,
    leaves the .txt as it is.

    Raises: BadSample where neither can be read.
    """
    found: dict[str, list[str]] = {}
    error: BadSample | None = None
    for suffix in CAPTIONS:
        if suffix in files:
            try:
                found[suffix] = captions_in(files[suffix], suffix, where)
            except BadSample as damage:
                error = damage
    lines, listed = (found.get(suffix, []) for suffix in CAPTIONS)
    if error and not (lines or listed):
        raise error
    one_of_the_lines = len(listed) == 1 and listed[0] in lines
    return lines if one_of_the_lines or not listed else listed


def captions_in(content: bytes, suffix: str, where: str) -> list[str]:
    """Parse the captions in a `.txt`, one a line, or a `.json`: a string, a list, or img2dataset's.

    Raises: BadSample where they cannot be read.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("caption not UTF-8", str(error), where) from error
    if suffix == ".txt":
        return visible(re.split("\r\n|\r|\n", text))  # U+0085 or U+2028 ends no caption
    try:
        return visible(as_captions(parse_json(text)) if text.strip() else [])
    except ValueError as error:
        raise BadSample("damaged captions", str(error), where) from error


def as_captions(found: Any) -> list[str]:
    """Return the captions of a JSON value: a string, a list, or an object with `CAPTION_KEYS`.

    Raises: ValueError where it is something else.
    """
    if isinstance(found, dict):
        values = (as_captions(found[key]) for key in CAPTION_KEYS if key in found)
        return next((captions for captions in values if visible(captions)), [])
    if isinstance(found, str):
        return [found]
    listed = [] if found is None else found
    if isinstance(listed, list) and all(text is None or isinstance(text, str) for text in listed):
        return [text for text in listed if text is not None]
    raise ValueError(f"expected a caption or a list of them, got {str(found)[:40]!r}")


def visible(captions: Iterable[str]) -> list[str]:
    """Return captions without white space around them, and without those that show nothing.

    A lone surrogate, half of a character, becomes U+FFFD: nothing could encode it.
    """
    texts = (SURROGATE.sub("\ufffd", text).strip() for text in captions)
    return [text for text in texts if not all(map(_is_invisible, text))]


def clean_captions(captions: Iterable[str]) -> list[str]:
    """Clean captions, and drop those that show nothing."""
    return visible(map(clean, visible(captions)))


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as captions are; ValueError where nothing is visible."""
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt is {prompt!r}, expected a text")
    if not (cleaned := clean_captions([prompt])):
        raise ValueError("the prompt is empty; describe an image, such as: an avocado armchair")
    return cleaned[0]


def _is_invisible(letter: str) -> bool:
    return letter in BLANK_LETTERS or unicodedata.category(letter) in BLANK_CATEGORIES


def sample_caption(
    captions: Iterable[str], where: str, cleaning: CleaningConfig, rng: random.Random
) -> str:
    """Clean captions of one image; return one within the limits of `cleaning`, at random.

    Raises: BadSample where no caption qualifies.
    """
    texts = clean_captions(captions) if cleaning.clean_captions else visible(captions)
    if not texts:
        raise BadSample("no caption", "there is no text in it", where)
    usable = [c for c in texts if cleaning.min_caption <= len(c) <= cleaning.max_caption]
    if usable:
        return rng.choice(usable)
    length = min(map(len, texts))
    if length < cleaning.min_caption:
        why = f"{length} characters, and --min-caption is {cleaning.min_caption}"
        raise BadSample("caption too short", why, where)
    why = f"{length} characters, and --max-caption is {cleaning.max_caption}"
    raise BadSample("caption too long", why, where)


def clean(caption: str) -> str:
    """Repair a caption as CLIP's training does: wrong decoding, HTML entities, white space."""
    import ftfy

    # Twice, since much of the web is escaped twice.
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())
