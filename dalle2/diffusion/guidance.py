"""From a network to a denoiser: guidance and clipping; and the exact denoiser of normal data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle2.diffusion.objective import Denoised, Objective, implied_noise, predicted_x0
from dalle2.diffusion.schedule import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, …], t [B]) → the network's prediction [B, …], under one condition."""

Denoise = Callable[[Tensor, int], Denoised]
"""(x_t [B, …], t) → what it holds of data and of noise. Samplers know nothing else of a network."""


def classifier_free(
    conditional: Predict,
    unconditional: Predict | None,
    scale: float,
    channels: int | None = None,
    contrasts: Sequence[tuple[Predict, Tensor]] = (),
) -> Predict:
    """Return a guided prediction, ∅ + scale·(c − ∅) (Ho & Salimans 2022).

    Scale 1 is no guidance: the condition's own prediction, bit for bit, in half of the time.
    Both predictions read the same x_t; only the condition is dropped.

    Args:
        channels: number of channels that are guided; those after them, a learned variance, stay the
            condition's own, as in GLIDE. None guides all.
        contrasts: predictions x under other conditions and strengths s [B, 1, …]; s·(c − x) is
            added for each, which weights what the other condition lacks.
    """
    if scale == 1 and not contrasts:
        return conditional
    if unconditional is None and scale != 1:
        raise ValueError(f"guidance is {scale:g}, expected 1: the model has no null condition")

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        found = conditional(x_t, t)
        guided = own = found[:, :channels]
        if unconditional is not None and scale != 1:
            null = unconditional(x_t, t)[:, :channels]
            guided = null + scale * (own - null)
        for other, strength in contrasts:
            guided = guided + strength * (own - other(x_t, t)[:, :channels])
        return guided if channels is None else torch.cat([guided, found[:, channels:]], 1)

    return predict


def dynamic_threshold(x0: Tensor, percentile: float = 0.995, limit: float = 1.0) -> Tensor:
    """Scale each sample whose large values leave [−limit, limit] back into it (Imagen, §2.3).

    Plain clipping saturates guided samples. Here the percentile p of |x₀| becomes the limit: values
    beyond p are clipped, and all are multiplied by limit / p. Samples within the limit stay as they
    are.
    """
    size = torch.quantile(x0.abs().flatten(1).float(), percentile, dim=1).clamp_min(limit)
    size = size.to(x0.dtype).view((-1,) + (1,) * (x0.ndim - 1))
    return x0.clamp(-size, size) * (limit / size)


@dataclass(frozen=True)
class Denoiser:
    """A network's predictions as data and noise; a `Denoise`."""

    predict: Predict
    schedule: Schedule
    objective: Objective
    guide: Callable[[Tensor, int], Tensor] | None = None
    """(x₀, t) → x₀ after a step along a gradient, such as `ClipGuide`."""
    clip: Callable[[Tensor], Tensor] | None = None
    """Function that restricts x₀ to what data can be, such as `dynamic_threshold`."""
    learns_variance: bool = False
    """Whether the prediction has twice the channels, the second half of them for the variance."""

    def __call__(self, x_t: Tensor, t: int) -> Denoised:
        times = torch.full((len(x_t),), t, dtype=torch.long, device=x_t.device)
        prediction, share = self.predict(x_t, times), None
        if self.learns_variance:
            prediction, variance = prediction.chunk(2, dim=1)
            share = (variance + 1) / 2
        x0 = predicted_x0(self.objective, prediction, x_t, self.schedule, times)
        if self.guide is not None:
            x0 = self.guide(x0, t)
        if self.clip is not None:
            x0 = self.clip(x0)
        return Denoised(x0, implied_noise(x0, x_t, self.schedule, times), share)


def gaussian_denoiser(schedule: Schedule, mean: float, std: float) -> Denoise:
    """Return the exact denoiser of data N(mean, std²): E[x₀ | x_t].

    Every sampler can be checked against it: what it samples from this denoiser is normal, and its
    mean and variance are known in closed form.
    """

    def denoise(x_t: Tensor, t: int) -> Denoised:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = (alpha * std) ** 2 + sigma**2
        x0 = mean + alpha * std**2 / variance * (x_t - alpha * mean)
        return Denoised(x0, (x_t - alpha * x0) / sigma)

    return denoise


def gaussian_error(schedule: Schedule, std: float) -> Callable[[int], float]:
    """Return t → Var(x₀ | x_t), the mean squared error of `gaussian_denoiser`, for `analytic`."""

    def error(t: int) -> float:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (sigma * std) ** 2 / ((alpha * std) ** 2 + sigma**2)

    return error
