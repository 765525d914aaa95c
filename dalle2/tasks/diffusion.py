"""What all trainings of denoising networks share: their loss, and how it is validated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2.diffusion.objective import Errors
from dalle2.diffusion.schedule import Schedule
from dalle2.prior import BINS


@dataclass(frozen=True, kw_only=True)
class DiffusionLoss:
    """The mean squared error of a prediction."""

    total: Tensor


@dataclass(frozen=True, kw_only=True)
class VarianceLoss(DiffusionLoss):
    """The mean squared error, and the bound that trains the variance."""

    mse: Tensor
    bound: Tensor
    """In bits per value."""


def diffusion_loss(errors: Errors) -> DiffusionLoss:
    """Return the mean over a batch."""
    total = errors.total.mean()
    if errors.bound is None:
        return DiffusionLoss(total=total)
    return VarianceLoss(total=total, mse=errors.mse.mean(), bound=errors.bound.mean())


def validation_times(count: int, schedule: Schedule, device: torch.device) -> Tensor:
    """Return fixed times of `count` validation samples, evenly spaced: [count].

    Every sample has the same time and noise at each validation: else they differ too much.
    """
    return ((torch.arange(count, device=device) + 0.5) * schedule.times / count).long()


def binned(errors: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the mean of errors at `validation_times`, of all and of ten ranges of times."""
    yield "loss", float(errors.mean())
    for number, part in enumerate(errors.tensor_split(BINS)):
        if len(part):  # fewer samples than ranges
            yield f"loss_{number}", float(part.mean())


def kept(count: int, dropped: float, rng: torch.Generator) -> Tensor:
    """Return which of `count` conditions are kept, bool [B]; each is dropped at that rate."""
    return torch.rand(count, generator=rng, device=rng.device) >= dropped
