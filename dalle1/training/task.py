"""The contract between the training loop and what it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from dalle1.data.loader import Loader
from dalle1.training.scaling import GradientScaler

Model = TypeVar("Model", bound=nn.Module)


class Loss(Protocol):
    """A dataclass of scalar tensors; `total` is minimised, all fields are logged."""

    @property
    def total(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class SampleCost:
    """Cost of one training sample, from which the log's throughput and MFU follow."""

    tokens: int
    """Positions of its stream."""
    flops: float
    """Floating-point operations of its forward and backward pass."""


class Task(Protocol[Model]):
    """What is trained: a model, its data, its losses and its evaluation. Subclass it."""

    model: Model
    """Model in training mode, on its device."""
    loader: Loader
    """Batches of this process."""
    initial_weights: Path | None = None
    """Safetensors file of parameters to start from, instead of the model's own."""
    scaler: GradientScaler | None = None
    """Gradient scaler for fp16; None: one scale for the whole loss."""
    contents: Mapping[str, Mapping[str, int | str | None]] = MappingProxyType({})
    """What identifies the content behind paths of the config, by setting; see `resume_key`."""
    cost: SampleCost | None = None
    """Cost of one sample; None: throughput is not logged."""

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[Loss]:
        """Compute the losses of `self.model` on a batch, or on one part of it.

        The mean of a loss over equal parts of a batch is the loss of the batch. The totals of
        several losses, one per objective (a GAN has two), are added before the backward pass: a
        loss has to detach the parameters that it is not meant to train.
        """

    def initial_name(self, name: str) -> str | None:
        """Return a parameter's name in `initial_weights`, by default its own; None for a new one.

        A new parameter starts as the model initialized it.
        """
        return name

    def initial_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Adapt a parameter in `initial_weights` to the model; by default it stays as it is."""
        return tensor

    def validate(self, model: Model) -> Iterator[tuple[str, float]]:
        """Yield names and values for the log.

        Args:
            model: `self.model`, with averaged parameters or with those in training.
        """

    def sample(self, model: Model, path: Path) -> None:
        """Write an image of samples to `path`; by default none."""
        return None

    def save(self, model: Model, folder: Path) -> None:
        """Write the model for use into `folder`."""
