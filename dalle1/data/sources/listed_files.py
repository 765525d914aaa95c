"""Finds the files that a list of captions names, however it names them."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
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

    Every name must stand for one image, and each for its own: no image gets another's captions.

    Args:
        names: what a list names.
        images: the images of the list's folder that it does not name exactly.
        any_folder: whether the folders may differ: leading ones of a name are dropped, and those
            of an image ignored, where at least half of the names are found in that way.

    Returns: name → image, and how many leading folders were dropped.
    """
    images = list(images)
    parts = {name: _fold(name).split("/") for name in names}
    depth = max(map(len, parts.values()), default=0) if any_folder else 1
    for dropped in range(depth):
        ends = {name: "/".join(found[dropped:]) for name, found in parts.items()}
        matches: dict[str, list[str]] = {end: [] for end in ends.values() if end}
        for image in images:
            found = _fold(image).split("/")
            for begin in range(len(found) if any_folder else 1):
                if (end := "/".join(found[begin:])) in matches:
                    matches[end].append(image)
        wanted = Counter(ends.values())
        unclear = any(images and len(images) + wanted[end] > 2 for end, images in matches.items())
        found_images = {
            name: matches[end][0]
            for name, end in ends.items()
            if len(matches.get(end, ())) == wanted[end] == 1
        }
        enough = 2 * len(found_images) >= len(parts) and not unclear
        if not any_folder or enough:
            return found_images, dropped
    return {}, 0


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/").lstrip("/")).casefold()
