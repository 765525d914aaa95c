"""How noise is removed: each sampler walks a list of steps (t, s) from noise to data.

A step reads x_t and the denoiser's x₀ and ε at t, and returns x_s:

    ancestral     a sample of q(x_s | x_t, x₀), the step of the training's own chain  (DDPM)
    ddim          x_s = α_s x₀ + σ_s ε: no new noise, so few steps suffice; η adds some
    dpm_solver    DPM-Solver++ 2M: extrapolates x₀ from this step and the one before

In every formula α and σ are read at t and at s, both of which the list of steps names. The last s
is CLEAN, where each sampler ends at the denoiser's x₀.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from dalle2.diffusion.guidance import Denoise
from dalle2.diffusion.objective import Denoised, step_log_variance
from dalle2.diffusion.schedule import CLEAN, Schedule, Step, StepMoments

Noise = Callable[[], Tensor]
"""() → the next standard normal noise of every sample in the batch, [B, …]."""

SamplerName = Literal["ancestral", "ddim", "dpm-solver"]


def ancestral_step(
    schedule: Schedule,
    x_t: Tensor,
    found: Denoised,
    step: Step,
    noise: Noise,
    error: float = 0.0,
) -> Tensor:
    """Sample x_s from q(x_s | x_t, x₀) with the denoiser's x₀.

    Its variance is the posterior's, or the learned one if `found` has it, plus what the denoiser
    does not know: `error`, the mean squared error of x₀ at t (Analytic-DPM, Bao et al. 2022). With
    the true error, steps of any length are exact for normal data.
    """
    t, s = step
    moments = StepMoments(schedule, t, s)
    mean = moments.from_x0 * found.x0 + moments.from_xt * x_t
    if found.log_variance_share is not None:
        std = (step_log_variance(schedule, t, s, found.log_variance_share) / 2).exp()
        return mean if s == CLEAN else mean + std.to(mean) * noise()
    variance = float(moments.posterior + moments.from_x0**2 * error)
    return mean + math.sqrt(variance) * noise() if variance else mean


def ancestral(
    schedule: Schedule,
    denoise: Denoise,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise,
    error: Callable[[int], float] | None = None,
) -> Tensor:
    """Sample by the training's own chain in reverse (DDPM, Ho et al. 2020).

    Args:
        x: noise at the first time of `steps`, [B, …].
        error: t → mean squared error of the denoiser's x₀; None is 0, as in DDPM.
    """
    for t, s in steps:
        x = ancestral_step(schedule, x, denoise(x, t), (t, s), noise, error(t) if error else 0.0)
    return x


def ddim_step(
    schedule: Schedule,
    x_t: Tensor,
    found: Denoised,
    step: Step,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Tensor:
    """Return x_s = α_s x₀ + σ_s ε, with a part η of the ancestral noise in it instead of ε."""
    t, s = step
    fresh = eta * float(StepMoments(schedule, t, s).posterior.sqrt()) if eta else 0.0
    kept = math.sqrt(max(schedule.sigma(s) ** 2 - fresh**2, 0.0))
    x = schedule.alpha(s) * found.x0 + kept * found.noise
    return x + fresh * noise() if fresh and noise is not None else x


def ddim(
    schedule: Schedule,
    denoise: Denoise,
    x: Tensor,
    steps: Sequence[Step],
    noise: Noise | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Sample by DDIM (Song et al. 2020): deterministic at η = 0, ancestral at η = 1."""
    if eta and noise is None:
        raise ValueError(f"eta is {eta:g}, which adds noise; expected a source of noise")
    for t, s in steps:
        x = ddim_step(schedule, x, denoise(x, t), (t, s), eta, noise)
    return x


def ddim_inverse(
    schedule: Schedule, denoise: Denoise, x0: Tensor, steps: Sequence[Step], rounds: int = 4
) -> Tensor:
    """Return the noise from which `ddim` at η = 0 samples x₀, [B, …].

    In terms of v = α ε − σ x₀, a step of DDIM is a rotation: x_s = cos δ x_t − sin δ v(x_t). So x_t
    is the fixed point of (x_s + sin δ v(x_t)) / cos δ. Iteration starts from the v of the step
    before; each of the `rounds` calls the denoiser once. Small steps converge sooner.
    """
    x, v = x0, torch.zeros_like(x0)
    for t, s in reversed(steps):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        cos = alpha * schedule.alpha(s) + sigma * schedule.sigma(s)
        sin = sigma * schedule.alpha(s) - alpha * schedule.sigma(s)
        for _ in range(rounds):
            found = denoise((x + sin * v) / cos, t)
            v = alpha * found.noise - sigma * found.x0
        x = (x + sin * v) / cos
    return x


def dpm_solver_step(
    schedule: Schedule, x_t: Tensor, x0: Tensor, step: Step, before: tuple[int, Tensor] | None
) -> Tensor:
    """Return x_s by DPM-Solver++ 2M (Lu et al. 2022).

    In λ = ln(α/σ), the step is exact for an x₀ that is constant, or with `before`, linear.

    Args:
        before: time and x₀ of the step before this one; None at the first step.
    """
    t, s = step
    if s == CLEAN:
        return x0
    length = schedule.log_snr(s) - schedule.log_snr(t)
    if before is not None:
        ratio = (schedule.log_snr(t) - schedule.log_snr(before[0])) / length
        x0 = x0 + (x0 - before[1]) / (2 * ratio)
    kept = schedule.sigma(s) / schedule.sigma(t)
    return kept * x_t - schedule.alpha(s) * math.expm1(-length) * x0


def dpm_solver(schedule: Schedule, denoise: Denoise, x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Sample by DPM-Solver++ 2M, deterministically: about 20 steps suffice."""
    before: tuple[int, Tensor] | None = None
    for t, s in steps:
        x0 = denoise(x, t).x0
        x = dpm_solver_step(schedule, x, x0, (t, s), before)
        before = t, x0
    return x


def sample(
    schedule: Schedule,
    denoise: Denoise,
    noise: Noise,
    *,
    steps: int,
    sampler: SamplerName = "ddim",
    eta: float = 0.0,
    error: Callable[[int], float] | None = None,
) -> Tensor:
    """Sample [B, …] from nothing but noise, by the sampler of that name."""
    if sampler not in get_args(SamplerName):
        raise ValueError(f"sampler is {sampler!r}, expected {' or '.join(get_args(SamplerName))}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number in [0, 1]")
    walk, x = schedule.steps(steps), noise()
    with torch.no_grad():
        if sampler == "ancestral":
            return ancestral(schedule, denoise, x, walk, noise, error)
        if sampler == "ddim":
            return ddim(schedule, denoise, x, walk, noise, eta)
        return dpm_solver(schedule, denoise, x, walk)
