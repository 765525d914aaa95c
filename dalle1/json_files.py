"""Read JSON that a user may have damaged: every mistake is a ValueError of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
"""Type of a JSON value → its name in messages."""


def parse_json(source: str | bytes | Path, expected: type = object) -> Any:
    """Parse a text, bytes in UTF-8, or a file; a byte order mark is ignored.

    Args:
        expected: type of the value.

    Raises: ValueError where it is no JSON, nested too deeply, not UTF-8 or of another type; OSError
        where the file cannot be read.
    """
    name = f"{source} is" if isinstance(source, Path) else "it is"
    content = source.read_bytes() if isinstance(source, Path) else source
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        found = json.loads(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} not UTF-8 (byte {error.start}), expected JSON") from error
    except RecursionError as error:
        raise ValueError(f"{name} nested too deeply, expected JSON of fewer levels") from error
    except ValueError as error:
        raise ValueError(f"{name} not JSON: {error}") from error
    if not isinstance(found, expected):
        kind = NAMES.get(type(found), repr(found)[:40])
        raise ValueError(f"{name} {kind}, expected {NAMES.get(expected, expected.__name__)}")
    return found
