"""What a denoising network predicts, and the losses that train it.

Given x_t and t, a network predicts one of three equivalent things:

    "epsilon"  the noise ε                        (Ho et al. 2020; the paper's decoder)
    "x0"       the data x₀                        (the paper's prior)
    "v"        v = α_t ε − σ_t x₀                 (Salimans & Ho 2022)

As x_t is known, each gives the other two. Near the last time α_t is nearly 0, and x₀ from ε divides
the network's error by it: clip x₀ there, or predict v, whose conversion never divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dalle2.diffusion.schedule import CLEAN, Schedule, StepMoments

Objective = Literal["epsilon", "x0", "v"]


@dataclass(frozen=True)
class Denoised:
    """What a network's prediction says of x_t: its data and its noise, both [B, …]."""

    x0: Tensor
    noise: Tensor
    log_variance_share: Tensor | None = None
    """Learned log-variance of a step: 0 is the posterior's, 1 is β's; see `step_log_variance`."""


def target(
    objective: Objective, x0: Tensor, noise: Tensor, schedule: Schedule, t: Tensor
) -> Tensor:
    """Return what the network should predict, [B, …]."""
    if objective == "epsilon":
        return noise
    if objective == "x0":
        return x0
    alpha, sigma = schedule.coefficients(t, x0)
    return alpha * noise - sigma * x0


def predicted_x0(
    objective: Objective, prediction: Tensor, x_t: Tensor, schedule: Schedule, t: Tensor
) -> Tensor:
    """Return the data that a prediction implies, [B, …]."""
    if objective == "x0":
        return prediction
    alpha, sigma = schedule.coefficients(t, x_t)
    if objective == "v":
        return alpha * x_t - sigma * prediction
    return (x_t - sigma * prediction) / alpha


def implied_noise(x0: Tensor, x_t: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
    """Return the noise that is left of x_t beside x₀, [B, …].

    It is computed after x₀ is clipped or guided, so that the two always add up to x_t.
    """
    alpha, sigma = schedule.coefficients(t, x_t)
    return (x_t - alpha * x0) / sigma


def sample_times(batch: int, schedule: Schedule, rng: torch.Generator) -> Tensor:
    """Sample training times [B], uniform in 0 … T − 1, one from each of B equal ranges.

    Stratified times have the same distribution as independent ones, and a steadier mean loss.
    """
    at = torch.rand(batch, generator=rng, device=rng.device) + torch.arange(
        batch, device=rng.device
    )
    return (at * (schedule.times / batch)).long().clamp_max(schedule.times - 1)


def mean_squared_error(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error of each sample: [B, …] → [B]."""
    return (prediction.float() - wanted.float()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Errors:
    """How wrong a network's predictions are, each [B]."""

    total: Tensor
    """What is minimized: `mse`, plus the bound where the variance is learned."""
    mse: Tensor
    """Mean squared error of the prediction."""
    bound: Tensor | None = None
    """Bound of a learned variance, in bits per value; None without one."""


def prediction_errors(
    predict: Callable[[Tensor, Tensor], Tensor],
    objective: Objective,
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    rng: torch.Generator,
    learns_variance: bool = False,
) -> Errors:
    """Noise data x₀ [B, …] to times t [B], and return the errors of what `predict` makes of it.

    Args:
        predict: (x_t, t) → the prediction, with twice the channels if it learns the variance.
    """
    noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    x_t = schedule.add_noise(x0, noise, t)
    prediction, wanted = predict(x_t, t), target(objective, x0, noise, schedule, t)
    if not learns_variance:
        mse = mean_squared_error(prediction, wanted)
        return Errors(mse, mse)
    prediction, variance = prediction.chunk(2, dim=1)
    mse = mean_squared_error(prediction, wanted)
    guess = predicted_x0(objective, prediction, x_t, schedule, t)
    bound = variance_bound(schedule, x0, x_t, t, guess, (variance + 1) / 2)
    # A time t stands for all T steps of the bound; improved DDPM weights their sum by 1/1000.
    return Errors(mse + bound * (schedule.times / 1000), mse, bound)


def step_log_variance(
    schedule: Schedule, t: int | Tensor, s: int | Tensor, share: Tensor | float
) -> Tensor:
    """Return ln σ² of a step back: between the posterior's variance (share 0) and β (share 1).

    The last step's posterior has no variance; there it is that of the step from t + 1 to t, as in
    improved DDPM (Nichol & Dhariwal 2021, §3.1).
    """
    time, moments = torch.as_tensor(t), StepMoments(schedule, t, s)
    before = StepMoments(schedule, (time + 1).clamp_max(schedule.times - 1), t).posterior
    low = torch.where(torch.as_tensor(s) == CLEAN, before, moments.posterior).log()
    return share * moments.beta.log() + (1 - share) * low


def variance_bound(
    schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, guess: Tensor, share: Tensor
) -> Tensor:
    """Return the bound that trains a learned variance, in bits per value: [B].

    It is KL(q(x_s | x_t, x₀) ‖ p(x_s | x_t)) for the step to s = t − 1, and −log₂ p(x₀ | x_t) for
    the last one. `guess`, the predicted x₀, is detached: only the variance learns from it.

    Args:
        t: times [B]; time 0 has the next time CLEAN, which is −1.
    """
    times = t.cpu().view((-1,) + (1,) * (x0.ndim - 1))
    moments = StepMoments(schedule, times, times - 1)
    log_variance = step_log_variance(schedule, times, times - 1, share.double().cpu())
    error = (moments.from_x0 * (guess.detach() - x0).double().cpu()) ** 2
    log_ratio = log_variance - moments.posterior.clamp_min(1e-30).log()
    divergence = log_ratio + (-log_ratio).exp() - 1 + error * (-log_variance).exp()
    likelihood = log_variance + math.log(2 * math.pi) + error * (-log_variance).exp()
    nats = torch.where(times == 0, likelihood, divergence) / 2
    return (nats.flatten(1).mean(1) / math.log(2)).to(x0)
