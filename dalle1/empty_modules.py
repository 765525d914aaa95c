"""Build modules whose weights are loaded later, without filling them first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

RANDOM_FILLS = "normal_", "uniform_", "kaiming_uniform_", "div_"
"""Functions that fill a new parameter, or scale it."""


class _KeepAsBuilt(TorchFunctionMode):
    """A mode in which random initialization changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_storage() -> Iterator[None]:
    """Build modules without storage and without random numbers: their weights are loaded later.

    Random numbers on torch's meta device would import its compiler, which takes two seconds.
    """
    with torch.device("meta"), _KeepAsBuilt():
        yield
