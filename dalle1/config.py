"""Checks that every config dataclass shares."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dalle1.json_files import parse_json

Config = TypeVar("Config")


def read_optional(cls: type[Config], path: Path) -> Config:
    """Read a config of all-optional fields from a JSON file; the defaults if it is missing.

    Fields that are unknown, as of later versions, are ignored. Raises: ValueError where the file is
    damaged.
    """
    if not path.is_file():
        return cls()
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    try:
        stored = parse_json(path.read_bytes(), dict)
        config = cls(**{name: x for name, x in stored.items() if name in known})
        check_types(config)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it to use the model without"
        ) from error
    return config


def check_literals(config: Any) -> None:
    """Raise ValueError where a field holds a value that its Literal annotation does not list."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        kind, value = hints[field.name], getattr(config, field.name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            expected = " or ".join(map(str, get_args(kind)))
            raise ValueError(f"{field.name} is {value!r}, expected {expected}")


def check_types(config: Any) -> None:
    """Raise ValueError where a field of a config has a value of another type.

    Scalars of NumPy are numbers.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_of(value, kind):
            raise ValueError(f"{name} is {repr(value)[:40]}, expected {_expected(kind)}")


def _expected(kind: Any) -> str:
    if get_origin(kind) in (Literal, Union, UnionType):
        return " or ".join(x if isinstance(x, str) else _expected(x) for x in get_args(kind))
    if kind in (float, type(None)):
        return "a finite number" if kind is float else "None"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _is_of(value: Any, kind: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in args
    if origin in (Union, UnionType):
        return any(_is_of(value, arg) for arg in args)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_of(item, arg) for pair in value.items() for item, arg in zip(pair, args)
        )
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(item, args[0]) for item in value)
    if kind is float:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        return is_number and -math.inf < value < math.inf
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return type(value) is (type(None) if kind is None else kind)


def image_counts(
    num_images: int | None, num_candidates: int | None, default: int = 16
) -> tuple[int, int]:
    """Return the numbers of images to keep and to sample: 4 of `default` where neither is given.

    Raises: ValueError unless 1 ≤ num_images ≤ num_candidates.
    """
    if num_candidates is None:
        num_candidates = max(default, num_images or 0)
    if num_candidates < 1:
        raise ValueError(f"num_candidates is {num_candidates}, expected at least 1")
    if num_images is None:
        num_images = min(4, num_candidates)
    if not 1 <= num_images <= num_candidates:
        raise ValueError(
            f"num_images is {num_images}, expected 1 to num_candidates, {num_candidates}"
        )
    return num_images, num_candidates
