"""Objectives, guidance, thresholds and noise: what a network's output is turned into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dalle2.diffusion.guidance import Denoiser, classifier_free, dynamic_threshold
from dalle2.diffusion.noise import CandidateNoise
from dalle2.diffusion.objective import predicted_x0, prediction_errors, sample_times, target
from dalle2.diffusion.samplers import sample
from dalle2.diffusion.schedule import Schedule


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
def test_a_perfect_prediction_is_the_data_and_the_noise(objective: Any) -> None:
    schedule, rng = Schedule(), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 2, 2, generator=rng, dtype=torch.float64).unbind()
    t = torch.tensor([0, 10, 500, 900, 999])
    x_t = schedule.add_noise(x0, noise, t)
    wanted = target(objective, x0, noise, schedule, t)
    torch.testing.assert_close(predicted_x0(objective, wanted, x_t, schedule, t), x0)
    for time, *rows in zip(t.tolist(), x_t.split(1), wanted.split(1), x0.split(1), noise.split(1)):
        found = Denoiser(lambda x, t, rows=rows: rows[1], schedule, objective)(rows[0], time)
        torch.testing.assert_close(found.x0, rows[2])
        torch.testing.assert_close(found.noise, rows[3])


def test_the_noise_is_what_a_clipped_x0_leaves() -> None:
    schedule, x_t = Schedule(), torch.full((1, 3), 2.0)
    denoise = Denoiser(lambda x, t: 5 * x, schedule, "x0", clip=lambda x: x.clamp(-1, 1))
    found = denoise(x_t, 400)
    alpha, sigma = schedule.alpha(400), schedule.sigma(400)
    torch.testing.assert_close(alpha * found.x0 + sigma * found.noise, x_t)
    assert found.x0.max() == 1


def test_a_learned_variance_is_read_from_the_second_half_of_the_channels() -> None:
    halves = torch.cat([torch.zeros(2, 3), torch.full((2, 3), -1.0)], 1)
    found = Denoiser(lambda x, t: halves, Schedule(), "x0", learns_variance=True)(halves[:, :3], 9)
    assert found.x0.shape == (2, 3)
    assert found.log_variance_share is not None
    assert found.log_variance_share.eq(0).all()


def test_guidance_moves_away_from_the_null_prediction() -> None:
    x, t = torch.ones(1, 2), torch.zeros(1, dtype=torch.long)
    calls: list[str] = []

    def constant(name: str, value: float) -> Any:
        def predict(x: Tensor, t: Tensor) -> Tensor:
            calls.append(name)
            return value * x

        return predict

    guided = classifier_free(constant("c", 3.0), constant("null", 1.0), 4.0)
    assert guided(x, t).eq(1 + 4 * 2).all()
    calls.clear()
    plain = classifier_free(constant("c", 3.0), constant("null", 1.0), 1.0)
    assert plain(x, t).eq(3).all()
    assert calls == ["c"]
    both = classifier_free(constant("c", 3.0), constant("null", 1.0), 4.0, channels=1)
    assert both(x, t).tolist() == [[9, 3]]  # the second channel is the condition's own
    with pytest.raises(ValueError, match="guidance is 2, expected 1: the model has no null"):
        classifier_free(constant("c", 3.0), None, 2.0)


def test_dynamic_thresholds_scale_only_samples_beyond_the_limit() -> None:
    x0 = torch.tensor([[0.5, -0.9, 0.1, 0.0], [4.0, -2.0, 1.0, 0.0]])
    kept = dynamic_threshold(x0, percentile=1.0)
    assert kept[0].equal(x0[0])
    torch.testing.assert_close(kept[1], x0[1] / 4)
    assert dynamic_threshold(x0, percentile=0.5).abs().max() <= 1


def test_times_are_uniform_and_spread_over_a_batch() -> None:
    schedule, rng = Schedule(), torch.Generator().manual_seed(0)
    times = torch.stack([sample_times(8, schedule, rng) for _ in range(200)])
    assert times.min() >= 0
    assert times.max() <= 999
    assert (times.div(125, rounding_mode="floor") == torch.arange(8)).all()
    assert float(times.float().mean()) == pytest.approx(499.5, abs=5)


def test_a_candidate_is_the_same_alone_and_in_a_batch() -> None:
    schedule = Schedule(times=50)
    denoise = Denoiser(lambda x, t: torch.tanh(x), schedule, "x0")

    def sampled(*candidates: int, seed: int = 3) -> Tensor:
        noise = CandidateNoise(seed, candidates, (2, 4), "decoder")
        return sample(schedule, denoise, noise, steps=5, eta=1.0)

    batch = sampled(0, 1, 2, 3)
    assert torch.equal(sampled(2)[0], batch[2])
    assert torch.equal(sampled(3, 1)[1], batch[1])
    assert not torch.equal(sampled(2, seed=4)[0], batch[2])
    parts = [CandidateNoise(3, [2], (4,), part)() for part in ("prior", "decoder")]
    assert not torch.equal(*parts)


def test_a_learned_variance_is_trained_by_its_bound_alone() -> None:
    schedule, rng = Schedule(times=100), torch.Generator().manual_seed(0)
    x0, t = torch.randn(4, 3, 2, 2, generator=rng), torch.tensor([0, 1, 50, 99])
    mean, variance = torch.zeros(2, 4, 3, 2, 2).unbind()
    mean.requires_grad_(), variance.requires_grad_()
    found = prediction_errors(
        lambda x, t: torch.cat([mean, variance], 1), "epsilon", schedule, x0, t, rng, True
    )
    assert found.bound is not None
    torch.testing.assert_close(found.total, found.mse + found.bound / 10)  # T / 1000
    found.bound.sum().backward(retain_graph=True)
    assert [bool(x.grad.any()) for x in (mean, variance)] == [False, True]  # type: ignore[union-attr]
    mean.grad = variance.grad = None
    found.mse.sum().backward()
    assert [bool(x.grad.any()) for x in (mean, variance)] == [True, False]  # type: ignore[union-attr]
