"""What every command shares: a preset first, clear errors, the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

Config = TypeVar("Config")


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def parse_preset(presets: Mapping[str, Config], args: Sequence[str] | None, about: str) -> Config:
    """Read a preset's name, then flags that override its fields.

    Args:
        presets: name → dataclass.
        args: the command line; None reads the process's.
        about: what the command does, for --help.
    """
    import tyro

    words = list(sys.argv[1:] if args is None else args)
    names = ", ".join(presets)
    if not words or words[0] in ("-h", "--help"):
        about = f"{about}\n\nThe first word is a preset: {names}. Below, {next(iter(presets))}'s."
        words, default = ["--help"], next(iter(presets.values()))
    elif words[0] not in presets:
        raise ValueError(f"no preset {words[0]!r}; there are: {names}")
    else:
        default = presets[words.pop(0)]
    return tyro.cli(type(default), default=default, args=words, description=about)


def pick_device(name: str) -> torch.device:
    """Give the device of that name; auto is cuda, else mps, else cpu."""
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name!r} is not to be had here; try auto or cpu") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
