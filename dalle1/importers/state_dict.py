"""Parts that the importers of foreign transformers share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dalle1.importers.checkpoint import numbers_after, without_prefix
from dalle1.model.transformer import Transformer, TransformerConfig

KINDS = ("weight", "bias")


class Foreign:
    """The tensors of a foreign model; it knows which of them were read."""

    def __init__(self, tensors: Mapping[str, Tensor], marker: str, path: str | Path) -> None:
        """Keep the tensors beside the one called `marker`, whatever their prefix."""
        self.tensors, self.path = without_prefix(tensors, marker, path), path
        self.unread = set(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(
                f"{self.path} has no tensor {name}, expected one; use the file as released"
            )
        self.unread.discard(name)
        return self.tensors[name]

    def count(self, prefix: str) -> int:
        """Return how many different numbers follow `prefix` in the names."""
        return len(list(numbers_after(prefix, self.tensors)))

    def warn_of_unread(self, *expected: str) -> None:
        """Warn of tensors that were not read, but for those whose names start as in `expected`."""
        names = sorted(name for name in self.unread if not name.startswith(expected))
        if names:
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            warnings.warn(
                f"{len(names)} tensors of {self.path} are not part of the model: {shown}",
                stacklevel=3,
            )


def rows(tensor: Tensor, count: int) -> Tensor:
    """Return the first `count` rows of a table, with rows of zeros for those it lacks."""
    missing = tensor.new_zeros(max(0, count - len(tensor)), *tensor.shape[1:])
    return torch.cat([tensor[:count], missing])


def build_transformer(
    config: TransformerConfig, tensors: Mapping[str, Tensor], path: str | Path
) -> Transformer:
    """Build a transformer around `tensors`, which are not copied.

    Args:
        path: file of the tensors, for error messages.

    Raises: ValueError where tensors are missing or of another shape.
    """
    with one_error(path):  # absurd sizes fail while the model is built
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict(dict(tensors), strict=True, assign=True)
    return model.eval()


@contextmanager
def one_error(path: str | Path, what: str = "the expected transformer") -> Iterator[None]:
    """Turn the errors that tensors of another shape cause into a one-line ValueError."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not match {what} ({reason})") from error
