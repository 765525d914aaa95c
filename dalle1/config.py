"""Checks that every config dataclass shares."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_literals(config: Any) -> None:
    """Raise ValueError where a field holds a value that its Literal annotation does not list."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        kind, value = hints[field.name], getattr(config, field.name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            expected = " or ".join(map(str, get_args(kind)))
            raise ValueError(f"{field.name} is {value!r}, expected {expected}")
