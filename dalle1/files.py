"""Files that are whole or not there, and folders whose results all come of the same settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file, and its folder, so that an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def claim(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that the results beside `path` come of, plain values, as JSON.

    Raises: ValueError where other settings are there already: their results would be taken for
        these.
    """
    settings = json.loads(json.dumps(settings))
    given = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    if given != settings:
        names = [name for name in {**given, **settings} if given.get(name) != settings.get(name)]
        raise ValueError(
            f"{path.parent} holds results of other settings ({', '.join(names)} differ); give "
            "another --out"
        )
    write_atomic(path, json.dumps(settings, indent=1) + "\n")
