"""Finds the files that a list of captions names, however it names them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath


def find_exactly(folder: Path, name: str) -> str | None:
    """Return a name by which a file exists, relative to `folder`: as it is, without blanks around
    it, or with slashes for Windows' backslashes."""
    stripped = name.strip()
    for variant in dict.fromkeys((name, stripped, stripped.replace("\\", "/"))):
        if os.path.isfile(folder / variant):
            return str(PurePath(variant))
    return None


def find_by_end(
    names: Sequence[str], images: Iterable[str], any_folder: bool
) -> tuple[dict[str, str], int]:
    """Find images that do not exist as they are named: in other letter case, or another folder.

    Args:
        names: what a list names.
        images: all images of the list's folder.
        any_folder: whether the folders may differ: leading ones of a name are dropped, and those
            of an image ignored, if then every name stands for one image, and each for its own.

    Returns: name → image, and how many leading folders were dropped.
    """
    images = list(images)
    parts = {name: _fold(name).split("/") for name in names}
    depth = max(map(len, parts.values()), default=0) if any_folder else 1
    for dropped in range(depth):
        ends = {name: "/".join(found[dropped:]) for name, found in parts.items()}
        matches: dict[str, str | None] = dict.fromkeys(ends.values())
        matches.pop("", None)
        several = set[str]()
        for image in images:
            found = _fold(image).split("/")
            for begin in range(len(found) if any_folder else 1):
                end = "/".join(found[begin:])
                if end in matches:
                    several.update([end] if matches[end] is not None else [])
                    matches[end] = image
        found_images = {
            name: image
            for name, end in ends.items()
            for image in [matches.get(end)]
            if image is not None and end not in several
        }
        distinct = len(set(found_images.values())) == len(found_images)
        if not any_folder or (len(found_images) == len(parts) and distinct):
            return found_images, dropped
    return {}, 0


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/").lstrip("/")).casefold()
