"""The samples of a browser: kept there, not on the server, with a thumbnail and all settings."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from dalle1.data.images import open_image

MAX_HISTORY = 24
THUMBNAIL = 128
"""Side of a thumbnail in pixels: about 4 kB of the 5 MB that a browser keeps."""
Entry = dict[str, Any]


def entry(prompt: str, model: str, settings: list[Any], image: Image.Image) -> Entry:
    """Return an entry of the history, which JSON supports."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=80)
    thumbnail = base64.b64encode(content.getvalue()).decode()
    return {"prompt": prompt, "model": model, "settings": settings, "thumbnail": thumbnail}


def added(history: Any, new: Entry) -> list[Entry]:
    """Return the history with a new entry first, and the oldest dropped."""
    others = [old for old in readable(history) if _key(old) != _key(new)]
    return [new, *others][:MAX_HISTORY]


def _key(entry: Entry) -> tuple[Any, ...]:
    return entry["prompt"], entry["model"], str(entry["settings"])


def readable(history: Any) -> list[Entry]:
    """Return the entries of what a browser kept; others, of an earlier version, are dropped."""
    kinds = {"prompt": str, "model": str, "settings": list, "thumbnail": str}
    return [
        row
        for row in (history if isinstance(history, list) else [])
        if isinstance(row, dict)
        and all(isinstance(row.get(k), kind) for k, kind in kinds.items())
        and row["settings"]
    ]


def gallery(history: Any) -> list[tuple[Image.Image, str]]:
    """Return thumbnails with captions, newest first."""
    shown = []
    for row in readable(history):
        try:
            image = open_image(base64.b64decode(row["thumbnail"]), "history").convert("RGB")
        except ValueError:
            image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "lightgrey")
        shown.append((image, f"{row['prompt']}, seed {row['settings'][0]}"))
    return shown
