"""How noise is added to data, and at which steps a sampler removes it.

A noised sample at time t mixes data x₀ with standard normal noise ε (Ho et al. 2020):

    x_t = α_t x₀ + σ_t ε,    α_t² + σ_t² = 1,    t = 0 … T − 1

From 0 to T − 1 the signal α_t falls from nearly 1 to nearly 0. Papers write ᾱ_t for α_t². The data
themselves are time `CLEAN`, where α = 1 and σ = 0.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

CLEAN = -1
"""Time of the data, which have no noise."""

ScheduleName = Literal["cosine", "linear", "scaled-linear"]
MAX_BETA = 0.999
Step = tuple[int, int]
"""A step of a sampler: its time t and the next, less noisy one, which may be CLEAN."""


def cosine_betas(times: int) -> Tensor:
    """Return β_t whose signal ᾱ falls along a squared cosine (Nichol & Dhariwal 2021)."""

    def signal(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - signal((t + 1) / times) / signal(t / times) for t in range(times)]
    return torch.tensor(betas, dtype=torch.float64, device="cpu").clamp_max(MAX_BETA)


def linear_betas(times: int) -> Tensor:
    """Return β_t that rise linearly (Ho et al. 2020), scaled to the same noise at any `times`."""
    scale = 1000 / times
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, times, dtype=torch.float64, device="cpu")
    return betas.clamp_max(MAX_BETA)


def scaled_linear_betas(times: int) -> Tensor:
    """Return β_t whose root rises linearly, as in Stable Diffusion, scaled as `linear_betas`."""
    first, last = (math.sqrt(beta * 1000 / times) for beta in (0.00085, 0.012))
    roots = torch.linspace(first, last, times, dtype=torch.float64, device="cpu")
    return (roots**2).clamp_max(MAX_BETA)


BETAS = {"cosine": cosine_betas, "linear": linear_betas, "scaled-linear": scaled_linear_betas}


class Schedule:
    """α_t and σ_t of every time t, in float64 on the CPU.

    They are indexed by times alone: nothing here computes "the time before t". Which times a
    sampler visits is `steps`, and its formulas read α and σ at both ends of a step.
    """

    def __init__(self, name: ScheduleName = "cosine", times: int = 1000) -> None:
        if times < 1:
            raise ValueError(f"times is {times}, expected at least 1")
        if name not in BETAS:
            raise ValueError(f"schedule is {name!r}, expected {', '.join(BETAS)}")
        self.name, self.times = name, times
        betas = BETAS[name](times)
        # The last entry is CLEAN, at index −1: ᾱ = 1.
        signal = torch.cat([(1 - betas).cumprod(0), betas.new_ones(1)])
        self.alphas, self.sigmas = signal.sqrt(), (1 - signal).sqrt()

    def alpha(self, t: int) -> float:
        """Return α_t, the scale of the data at time t."""
        return float(self.alphas[t])

    def sigma(self, t: int) -> float:
        """Return σ_t, the standard deviation of the noise at time t."""
        return float(self.sigmas[t])

    def log_snr(self, t: int) -> float:
        """Return λ_t = ln(α_t / σ_t), half the logarithm of the signal-to-noise ratio."""
        return math.log(self.alpha(t)) - math.log(self.sigma(t)) if t != CLEAN else math.inf

    def steps(self, count: int) -> list[Step]:
        """Return `count` steps, evenly spaced in time, from the noisiest time T − 1 to CLEAN."""
        if not 1 <= count <= self.times:
            raise ValueError(f"steps is {count}, expected 1 to {self.times}")
        ends = [CLEAN + round(i * (self.times / count)) for i in range(count, -1, -1)]
        return list(pairwise(ends))

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return α_t and σ_t of a batch of times [B], shaped to multiply `like` [B, …]."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        times = t.cpu()
        found = (self.alphas[times], self.sigmas[times])
        alpha, sigma = (values.to(like.device, like.dtype).view(shape) for values in found)
        return alpha, sigma

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = α_t x₀ + σ_t ε: [B, …], with times t [B]."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * noise


class StepMoments:
    """Mean and variance of the exact step back from t to s, if x₀ were known.

    q(x_s | x_t, x₀) is normal with mean `from_x0`·x₀ + `from_xt`·x_t and variance `posterior`; the
    step forward has the variance `beta`. Times are integers, or tensors of them.
    """

    def __init__(self, schedule: Schedule, t: int | Tensor, s: int | Tensor) -> None:
        alpha, next_alpha = schedule.alphas[t], schedule.alphas[s]
        variance, next_variance = schedule.sigmas[t] ** 2, schedule.sigmas[s] ** 2
        kept = alpha / next_alpha  # of x_s in x_t
        self.beta = 1 - kept**2
        self.from_x0 = next_alpha * self.beta / variance
        self.from_xt = kept * next_variance / variance
        self.posterior = next_variance * self.beta / variance
