"""A task made of functions, for tests of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle1.data.loader import Batch
from dalle1.training.task import Loss, Task


class FunctionLoader:
    """Batches of a function of the step."""

    def __init__(self, stream: Callable[[int], Iterable[Mapping[str, Tensor]]]) -> None:
        self.stream = stream

    def batches(self, start: int) -> Iterator[Batch]:
        for tensors in self.stream(start):
            yield Batch(tensors=dict(tensors))

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("there is no state")


class FunctionTask(Task[Any]):
    """Trains `model` on the losses of `loss`: (model, batch, step, rng) → one loss or several."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Loss | Sequence[Loss]],
        stream: Callable[[int], Iterable[Mapping[str, Tensor]]] = lambda start: [],
        *,
        validate: Callable[[nn.Module], Mapping[str, float]] = lambda model: {},
        save: Callable[[nn.Module, Path], object] = lambda model, folder: None,
        **attributes: Any,
    ) -> None:
        self.model, self.loss, self.loader = model.train(), loss, FunctionLoader(stream)
        self._validate, self._save = validate, save
        for name, value in attributes.items():
            setattr(self, name, value)

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[Loss]:
        loss = self.loss(self.model, batch, step, rng)
        return loss if isinstance(loss, Sequence) else [loss]

    def validate(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        yield from self._validate(model).items()

    def save(self, model: nn.Module, folder: Path) -> None:
        self._save(model, folder)
