"""Stage 1: the relaxation, the objective by hand, evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1.evaluation.reconstruction import reconstruction_metrics
from dvae import DVAE, DVAEConfig, dvae_loss
from dvae.gumbel import gumbel_noise, gumbel_softmax
from dvae.losses import (
    distortion_of,
    kl_to_uniform,
    logit_laplace_nll,
    psnr,
    squeeze_pixels,
    usage_gap,
)

TINY = DVAEConfig(image_size=16, width=8, codebook_size=20, code_width=12)


def tiny(config: DVAEConfig = TINY) -> DVAE:
    torch.manual_seed(0)
    return DVAE(config).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=seeded())


# The relaxation


def test_gumbel_noise_has_its_distribution() -> None:
    noise = gumbel_noise(torch.empty(100_000), seeded())
    for value in (-1.0, 0.0, 1.0, 3.0):  # P(G ≤ g) = exp(−exp(−g)); 0.006 is four sigma
        share = (noise <= value).float().mean().item()
        assert share == pytest.approx(math.exp(-math.exp(-value)), abs=0.006)


def test_relaxed_sample_is_a_softmax_of_noisy_logits() -> None:
    logits = torch.randn(5, 4, generator=seeded(1))
    noise = gumbel_noise(logits, seeded(2))
    for temperature in (1.0, 0.25):
        sample = gumbel_softmax(logits, temperature, seeded(2))
        torch.testing.assert_close(sample, ((logits + noise) / temperature).softmax(-1))
        torch.testing.assert_close(sample.sum(-1), torch.ones(5))
    assert not torch.equal(gumbel_softmax(logits, 1.0, seeded(3)), sample)


def test_cold_samples_have_softmax_frequencies() -> None:
    logits, count = torch.tensor([2.0, 1.0, 0.0, -1.0]), 20_000
    sample = gumbel_softmax(logits.expand(count, 4), 0.01, seeded())
    assert sample.max(-1).values.mean() > 0.98
    seen = sample.argmax(-1).bincount(minlength=4).double()
    expected = count * logits.double().softmax(-1)
    assert ((seen - expected) ** 2 / expected).sum() < 16.3  # χ² with 3 degrees: once in 1,000


def test_gradient_flows_through_the_relaxed_sample() -> None:
    logits = torch.randn(2, 3, generator=seeded(), requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.5])
    sample = gumbel_softmax(logits, 0.5, seeded(4))
    (sample * weights).sum().backward()
    # d softmax(x/τ)·w / dx = s (w − s·w) / τ
    s = sample.detach()
    expected = s * (weights - (s * weights).sum(-1, keepdim=True)) / 0.5
    torch.testing.assert_close(logits.grad, expected)
    assert logits.grad.abs().min() > 0


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        gumbel_softmax(torch.zeros(2, 3), temperature)


# The objective


def test_logit_laplace_by_hand() -> None:
    half = torch.tensor(0.5)
    # |0 − 1|/2 + ln(2·2) + ln(1/4) = 1/2
    value = logit_laplace_nll(half, torch.tensor(1.0), torch.tensor(2.0).log())
    assert value.item() == pytest.approx(0.5, abs=1e-6)
    # logit 0.8 = ln 4: |ln 4 − 0|·4 + ln(2/4) + ln 0.16
    value = logit_laplace_nll(torch.tensor(0.8), torch.tensor(0.0), torch.tensor(0.25).log())
    assert value.item() == pytest.approx(4 * math.log(4) - math.log(2) + math.log(0.16), rel=1e-5)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 1.0), (2.0, 0.5), (-3.0, 0.1), (0.7, 2.0)])
def test_logit_laplace_is_a_density(mu: float, b: float) -> None:
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64).sigmoid()
    density = torch.exp(-logit_laplace_nll(x, torch.tensor(mu), torch.tensor(b).log()))
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-3)


def test_gradients_of_the_objective_by_finite_differences() -> None:
    x = torch.rand(6, generator=seeded(), dtype=torch.float64) * 0.8 + 0.1
    mean = torch.linspace(-4, 4, 6, dtype=torch.float64, requires_grad=True)
    log_scale = torch.linspace(-2, 1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: logit_laplace_nll(x, m, s), (mean, log_scale))


def test_gradient_of_the_kl_by_hand() -> None:
    # d KL / d logits = q (ln q − Σ q ln q); the function itself is fp32 by design.
    logits = torch.randn(5, 7, generator=seeded(), requires_grad=True)
    kl_to_uniform(logits).sum().backward()
    q = logits.detach().double().softmax(-1)
    expected = q * (q.log() - (q * q.log()).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_kl_to_uniform_by_hand() -> None:
    assert kl_to_uniform(torch.full((2, 50), 3.0)).abs().max() < 1e-6
    sure = torch.full((50,), -1e4)
    sure[7] = 1e4
    assert kl_to_uniform(sure).item() == pytest.approx(math.log(50), rel=1e-6)
    q = [0.5, 0.25, 0.25]
    expected = -1.5 * math.log(2) + math.log(3)  # Σ q ln q + ln 3
    value = kl_to_uniform(torch.tensor([q, q]).log() + 9)
    assert value.tolist() == pytest.approx([expected, expected], abs=1e-6)


def test_usage_gap_by_hand() -> None:
    certain = 1e4 * torch.eye(4)
    assert usage_gap(certain.view(2, 2, 4)).abs() < 1e-6  # each code once
    assert usage_gap(certain[[1, 1, 1]]).item() == pytest.approx(math.log(4), rel=1e-5)
    # Codes 0, 0, 1, 2: H = 1.5 ln 2, so the gap is ln 4 − 1.5 ln 2 = ln 2 / 2.
    gap = usage_gap(certain[[0, 0, 1, 2]].view(1, 2, 2, 4))
    assert gap.item() == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert usage_gap(torch.zeros(3, 4)).abs() < 1e-6  # undecided everywhere: no code preferred


def objective(count: int = 2, height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    images = random_images(count, height, width)
    stats = torch.randn(count, 6, height, width, generator=seeded(1))
    logits = 2 * torch.randn(count, height // 8, width // 8, 10, generator=seeded(2))
    return images, stats, logits


def test_loss_by_hand() -> None:
    images, stats = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 6, 8, 8)
    stats[:, :3], stats[:, 3:] = 1.0, math.log(2)
    logits = torch.tensor([0.5, 0.25, 0.25]).log().view(1, 1, 1, 3)
    loss = dvae_loss(images, stats, logits, beta=6.6, usage_weight=2.0)
    kl = math.log(3) - 1.5 * math.log(2)
    assert loss.distortion.item() == pytest.approx(0.5, abs=1e-6)
    assert loss.kl.item() == pytest.approx(kl, abs=1e-6)
    assert loss.usage_gap.item() == pytest.approx(kl, abs=1e-6)  # one position is its own mean
    assert loss.total.item() == pytest.approx(0.5 + 8.6 * kl / 192, abs=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("mse", 0.04), ("l1", 0.2)])
def test_other_distortions_by_hand(kind: Any, expected: float) -> None:
    images = torch.full((2, 3, 16, 16), 0.5)
    stats = torch.cat([torch.logit(squeeze_pixels(images + 0.2)), torch.randn(2, 3, 16, 16)], 1)
    assert distortion_of(images, stats, kind).item() == pytest.approx(expected, rel=1e-4)
    farther = torch.cat([torch.logit(squeeze_pixels(images + 0.3)), stats[:, 3:]], 1)
    assert distortion_of(images, farther, kind) > distortion_of(images, stats, kind)
    twice = [torch.cat([x, x]) for x in (images, stats)]
    torch.testing.assert_close(distortion_of(*twice, kind), distortion_of(images, stats, kind))
    loss = dvae_loss(images, stats, torch.zeros(2, 2, 2, 7), beta=1.0, distortion=kind)
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)  # the KL of uniform is 0


def test_a_squared_error_beside_the_likelihood() -> None:
    images = random_images()
    stats, logits = torch.zeros(2, 6, 16, 16), torch.zeros(2, 2, 2, 7)
    plain = dvae_loss(images, stats, logits, beta=1.0)
    beside = dvae_loss(images, stats, logits, beta=1.0, mse_weight=3.0)
    extra = 3 * distortion_of(images, stats, "mse")
    assert beside.total.item() == pytest.approx((plain.total + extra).item())
    assert beside.distortion == plain.distortion


def test_an_unknown_distortion_is_refused() -> None:
    with pytest.raises(ValueError, match="distortion is 'psnr', expected logit-laplace, mse or l1"):
        distortion_of(random_images(), torch.zeros(2, 6, 16, 16), "psnr")  # type: ignore[arg-type]


def test_loss_does_not_depend_on_the_size_of_the_batch() -> None:
    parts = objective(3)
    once = dvae_loss(*parts, beta=6.6, usage_weight=1.0)
    twice = dvae_loss(*(torch.cat([x, x]) for x in parts), beta=6.6, usage_weight=1.0)
    for name, value in vars(once).items():
        assert getattr(twice, name).item() == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize(("height", "width"), [(256, 256), (8, 8), (16, 40)])
def test_beta_weighs_one_code_by_a_192nd_at_any_size(height: int, width: int) -> None:
    parts = objective(2, height, width)
    without = dvae_loss(*parts, beta=0.0)
    loss = dvae_loss(*parts, beta=192.0)
    assert loss.kl.item() > 0.5
    assert (loss.total - without.total).item() == pytest.approx(loss.kl.item(), rel=1e-4)
    used = dvae_loss(*parts, beta=0.0, usage_weight=192.0)
    assert (used.total - without.total).item() == pytest.approx(used.usage_gap.item(), rel=1e-3)


def test_each_part_of_the_loss_has_its_sign() -> None:
    images, stats, logits = objective()
    loss = dvae_loss(images, stats, logits, beta=1.0)
    nearer = stats.clone()
    nearer[:, :3] = torch.logit(squeeze_pixels(images))
    assert dvae_loss(images, nearer, logits, beta=1.0).distortion < loss.distortion
    assert 0 < loss.usage_gap < loss.kl  # the mean posterior is nearer to uniform than each is
    surer = dvae_loss(images, stats, 3 * logits, beta=1.0)
    assert surer.kl > loss.kl
    assert surer.total > loss.total


def test_psnr_by_hand() -> None:
    images = torch.zeros(2, 3, 4, 4)
    reconstructions = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert psnr(images, reconstructions).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert psnr(images, images).tolist() == pytest.approx([100, 100])  # capped, not infinite


def test_a_few_steps_lower_the_loss() -> None:
    model, images = tiny(), torch.tensor([0.0, 0.3, 0.6, 1.0]).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        stats, logits = model(images, 1.0, seeded(step))
        loss = dvae_loss(images, stats, logits, beta=0.1)
        loss.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.distortion.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 0.05


def test_reconstruction_metrics() -> None:
    model, images = tiny(), random_images(5)
    numbers = dict(reconstruction_metrics(model, images, 1 / 16, batch_size=2))
    assert set(numbers) == {
        *("psnr_hard", "psnr_relaxed", "elbo_hard", "elbo_relaxed"),
        *("kl_nats", "kl_bits", "codes_used", "perplexity"),
    }
    codes = model.encode(images)
    loss = dvae_loss(images, model.decoder(codes), model.logits(images), beta=1.0)
    assert numbers["elbo_hard"] == pytest.approx(-loss.total.item(), rel=1e-5)
    assert numbers["kl_nats"] == pytest.approx(loss.kl.item(), rel=1e-5)
    assert numbers["kl_bits"] == pytest.approx(numbers["kl_nats"] / math.log(2))
    hard = psnr(images, model.decode(codes)).mean().item()
    assert numbers["psnr_hard"] == pytest.approx(hard, rel=1e-5)
    assert 3 < numbers["psnr_relaxed"] < 30
    assert math.isfinite(numbers["elbo_relaxed"])
    shares = codes.flatten().bincount().double() / codes.numel()
    shares = shares[shares > 0]
    assert numbers["codes_used"] == len(shares) > 1
    perplexity = math.exp(-(shares * shares.log()).sum().item())
    assert numbers["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert dict(reconstruction_metrics(model, images, 1 / 16, batch_size=2)) == numbers
