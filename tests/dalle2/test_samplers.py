"""Samplers against the exact denoiser of a normal distribution, and against diffusers.

A sampler is linear in its noise where the denoiser is. So one batch with a unit of noise at each
step in turn, and one sample without any, gives the exact mean and variance of what it samples.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle2.diffusion import samplers
from dalle2.diffusion.guidance import Denoise, gaussian_denoiser, gaussian_error
from dalle2.diffusion.objective import Denoised, step_log_variance, variance_bound
from dalle2.diffusion.schedule import CLEAN, Schedule, StepMoments

MEAN, STD = 0.3, 0.5
COUNTS = [1, 2, 7, 27, 64, 1000]


class UnitNoise:
    """Noise k is 1 for sample k and 0 for all others; the last sample has none."""

    def __init__(self, count: int) -> None:
        self.count, self.used = count, 0

    def __call__(self) -> Tensor:
        unit = torch.zeros(self.count + 1, 1, dtype=torch.float64)
        unit[self.used] = 1
        self.used += 1
        return unit


def moments(schedule: Schedule, steps: int, **how: Any) -> tuple[float, float]:
    """Return the mean and the standard deviation of what a sampler samples."""
    denoise = gaussian_denoiser(schedule, MEAN, STD)
    x = samplers.sample(schedule, denoise, UnitNoise(steps + 1), steps=steps, **how)[:, 0]
    return float(x[-1]), float((x[:-1] - x[-1]).norm())


def turns(schedule: Schedule, steps: int) -> list[float]:
    """Return the angles between (α_t·std, σ_t) at both ends of each step."""
    angle = [math.atan2(float(s), float(a) * STD) for a, s in zip(schedule.alphas, schedule.sigmas)]
    return [angle[t] - angle[s] for t, s in schedule.steps(steps)]


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_steps_reach_from_pure_noise_to_the_data(name: Any, steps: int) -> None:
    walk = Schedule(name).steps(steps)
    assert len(walk) == steps
    assert walk[0][0] == 999
    assert walk[-1][1] == CLEAN
    assert all(t > s for t, s in walk)
    assert [t for t, _ in walk[1:]] == [s for _, s in walk[:-1]]


@pytest.mark.parametrize("steps", COUNTS)
def test_ancestral_steps_of_any_length_are_exact_with_the_true_error(steps: int) -> None:
    schedule = Schedule()
    mean, std = moments(schedule, steps, sampler="ancestral", error=gaussian_error(schedule, STD))
    # The last time has a little signal left, α = 5e-5, which pure noise lacks.
    assert mean == pytest.approx(MEAN, abs=2e-5)
    assert std == pytest.approx(STD, abs=1e-6)


@pytest.mark.parametrize("steps", COUNTS)
def test_ddim_samples_the_mean_and_loses_the_turns_of_its_steps(steps: int) -> None:
    schedule = Schedule()
    mean, std = moments(schedule, steps, sampler="ddim")
    lost = math.prod(math.cos(turn) for turn in turns(schedule, steps))
    start = math.hypot(schedule.alpha(999) * STD, schedule.sigma(999))
    assert mean == pytest.approx(MEAN, abs=2e-5)
    assert std == pytest.approx(STD * lost / start, abs=1e-9)


def test_all_samplers_converge_to_the_data() -> None:
    schedule = Schedule()
    for how in ({"sampler": "ddim"}, {"sampler": "dpm-solver"}, {"sampler": "ancestral"}):
        mean, std = moments(schedule, 1000, **how)
        assert (mean, std) == pytest.approx((MEAN, STD), abs=3e-3)
    _, few = moments(schedule, 27, sampler="dpm-solver")
    _, ddim = moments(schedule, 27, sampler="ddim")
    assert abs(few - STD) < abs(ddim - STD)


@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_ddim_with_eta_1_is_the_ancestral_sampler(steps: int) -> None:
    schedule = Schedule()
    ancestral = moments(schedule, steps, sampler="ancestral")
    assert moments(schedule, steps, sampler="ddim", eta=1) == pytest.approx(ancestral, abs=1e-12)


def test_a_learned_variance_reaches_from_the_posterior_to_beta() -> None:
    schedule, step = Schedule(), (500, 250)
    found = StepMoments(schedule, *step)
    assert step_log_variance(schedule, *step, 0.0).exp() == pytest.approx(float(found.posterior))
    assert step_log_variance(schedule, *step, 1.0).exp() == pytest.approx(float(found.beta))
    x, ones = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    told = Denoised(x, x, ones)
    assert samplers.ancestral_step(schedule, x, told, step, lambda: ones) == pytest.approx(
        math.sqrt(found.beta)
    )


def test_the_bound_is_least_at_the_true_variance() -> None:
    schedule, t = Schedule(), torch.tensor([0, 1, 400, 999])
    x0 = torch.zeros(4, 2, 3)
    exact = variance_bound(schedule, x0, x0, t, x0, torch.zeros(4, 2, 3))
    assert exact[1:].abs().max() < 1e-6  # q itself
    wider = variance_bound(schedule, x0, x0, t, x0, torch.ones(4, 2, 3))
    assert (wider[1:] > exact[1:]).all()
    guess = torch.full_like(x0, 0.1, requires_grad=True)
    share = torch.full_like(x0, 0.5, requires_grad=True)
    variance_bound(schedule, x0, x0, t, guess, share).sum().backward()
    assert guess.grad is None
    assert share.grad is not None


@pytest.mark.parametrize("steps", [7, 27, 200])
def test_ddim_inversion_finds_the_noise_of_a_sample(steps: int) -> None:
    schedule = Schedule()
    denoise, walk = gaussian_denoiser(schedule, MEAN, STD), schedule.steps(steps)
    noise = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = samplers.ddim(schedule, denoise, noise, walk)
    found = samplers.ddim_inverse(schedule, denoise, x0, walk, rounds=8)
    torch.testing.assert_close(found, noise, atol=2e-3, rtol=0)
    again = samplers.ddim(schedule, denoise, found, walk)
    torch.testing.assert_close(again, x0, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 0}, "steps is 0, expected 1 to 1000"),
        ({"steps": 1001}, "steps is 1001, expected 1 to 1000"),
        ({"steps": 4, "sampler": "euler"}, "sampler is 'euler', expected ancestral or ddim or"),
        ({"steps": 4, "eta": 2.0}, r"eta is 2.0, expected a number in \[0, 1\]"),
    ],
)
def test_what_cannot_be_sampled_is_refused(how: dict[str, Any], message: str) -> None:
    schedule = Schedule()
    denoise = gaussian_denoiser(schedule, MEAN, STD)
    with pytest.raises(ValueError, match=message):
        samplers.sample(schedule, denoise, UnitNoise(4), **how)


def curved(schedule: Schedule) -> Denoise:
    """Return a denoiser that is not linear, so that errors of a solver cannot cancel."""

    def denoise(x: Tensor, t: int) -> Denoised:
        x0 = torch.tanh(2 * x)
        return Denoised(x0, (x - schedule.alpha(t) * x0) / schedule.sigma(t))

    return denoise


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_steps_equal_those_of_diffusers(name: Any) -> None:
    """DDPM and DPM-Solver++ at our times, DDIM at its own (leading) ones."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers; `make test` installs it")
    settings = {
        "beta_schedule": {"cosine": "squaredcos_cap_v2", "linear": "linear"}[name],
        "prediction_type": "sample",
    }
    schedule, steps = Schedule(name), 27
    denoise, walk = curved(schedule), schedule.steps(steps)
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()

    ddpm = diffusers.DDPMScheduler(clip_sample=False, **settings)
    ddpm.set_timesteps(timesteps=[t for t, _ in walk])
    for step in walk[:-1]:
        found, own = denoise(start, step[0]), torch.Generator().manual_seed(7)
        noise = torch.randn(
            start.shape, generator=torch.Generator().manual_seed(7), dtype=start.dtype
        )
        theirs = ddpm.step(found.x0, step[0], start, generator=own).prev_sample
        ours = samplers.ancestral_step(schedule, start, found, step, lambda noise=noise: noise)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    solver = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero", **settings)
    solver.set_timesteps(timesteps=[t for t, _ in walk])
    theirs = start
    for t, _ in walk:
        theirs = solver.step(denoise(theirs, t).x0, t, theirs).prev_sample
    ours = samplers.dpm_solver(schedule, denoise, start, walk)
    torch.testing.assert_close(ours, theirs.to(ours.dtype), atol=1e-5, rtol=1e-5)

    ddim = diffusers.DDIMScheduler(clip_sample=False, **settings)
    ddim.set_timesteps(steps)
    times = ddim.timesteps.tolist()
    leading = list(zip(times, [*times[1:], CLEAN]))
    theirs = start
    for t in times:
        theirs = ddim.step(denoise(theirs, t).x0, t, theirs).prev_sample
    torch.testing.assert_close(
        samplers.ddim(schedule, denoise, start, leading), theirs, atol=1e-5, rtol=1e-5
    )
