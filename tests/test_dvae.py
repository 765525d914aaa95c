"""Stage 1: the paper's sizes and blocks, the relaxation, the objective by hand, weights on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from dvae import DVAE, DVAEConfig, elbo_loss, evaluate
from dvae.gumbel import gumbel_noise, gumbel_softmax
from dvae.losses import (
    kl_to_uniform,
    logit_laplace_nll,
    psnr,
    squeeze_pixels,
    unsqueeze_pixels,
    usage_gap,
)
from dvae.model import FILE_NAME, Block

TINY = DVAEConfig(image_size=16, width=8, codebook_size=20, code_width=12)


def tiny(config: DVAEConfig = TINY) -> DVAE:
    torch.manual_seed(0)
    return DVAE(config).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=seeded())


# The network


def test_paper_size_has_exactly_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = DVAE(DVAEConfig())
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    assert (model.vocab_size, model.grid_size) == (8192, 32)
    assert model.encoder.groups[0][0].gain == 1 / 64
    assert model.decoder.input.weight.shape == (128, 8192, 1, 1)


@pytest.mark.parametrize(
    ("width", "height", "across", "blocks", "codebook", "code_width"),
    [(4, 8, 8, 1, 5, 3), (8, 16, 40, 2, 20, 12), (12, 24, 16, 3, 33, 1)],
)
def test_shapes(
    width: int, height: int, across: int, blocks: int, codebook: int, code_width: int
) -> None:
    model = tiny(
        DVAEConfig(
            width=width, blocks_per_group=blocks, codebook_size=codebook, code_width=code_width
        )
    )
    images = pictures(2, height, across)
    stats, logits = model(images, 1.0, seeded())
    codes = model.encode(images)
    assert logits.shape == (2, height // 8, across // 8, codebook)
    assert stats.shape == (2, 6, height, across)
    assert codes.shape == (2, height // 8, across // 8)
    assert codes.dtype == torch.int64
    assert model.decode(codes).shape == images.shape


def conv(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)


def reference_block(weights: dict[str, Tensor], name: str, x: Tensor, gain: float) -> Tensor:
    y = x
    for i in range(1, 5):
        y = conv(weights, f"{name}.residual.conv_{i}", F.relu(y))
    changes = f"{name}.identity.weight" in weights
    return (conv(weights, f"{name}.identity", x) if changes else x) + gain * y


def reference_groups(weights: dict[str, Tensor], side: str, x: Tensor) -> Tensor:
    for group in range(4):
        if group and side == "encoder":
            x = F.max_pool2d(x, 2)
        elif group:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for block in range(2):
            x = reference_block(weights, f"{side}.groups.{group}.{block}", x, 1 / 64)
    return conv(weights, f"{side}.output", F.relu(x))


def test_network_is_that_of_the_paper_s_table() -> None:
    # Large biases and residual paths, so that a wrong order, gain or padding shows.
    model = tiny()
    for name, weight in model.named_parameters():
        scale = 20.0 if ".residual.conv_4" in name else 1.5
        weight.data = torch.randn(weight.shape, generator=seeded(len(name))) * scale / 8
    weights = dict(model.named_parameters())
    images = pictures(2, 16, 24)
    x = conv(weights, "encoder.input", 0.8 * images + 0.1)
    logits = reference_groups(weights, "encoder", x).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.logits(images), logits, rtol=1e-4, atol=1e-4)

    z = torch.rand(2, 2, 3, 20, generator=seeded()).softmax(-1)
    x = conv(weights, "decoder.input", z.permute(0, 3, 1, 2))
    stats = reference_groups(weights, "decoder", x)
    torch.testing.assert_close(model.decoder(z), stats, rtol=1e-4, atol=1e-4)
    kernels = [weights[f"encoder.groups.1.0.residual.conv_{i}.weight"] for i in range(1, 5)]
    assert [k.shape[-1] for k in kernels] == [3, 3, 3, 1]
    kernels = [weights[f"decoder.groups.1.0.residual.conv_{i}.weight"] for i in range(1, 5)]
    assert [k.shape[-1] for k in kernels] == [1, 3, 3, 3]


def test_weights_begin_as_published() -> None:
    model = tiny(DVAEConfig(width=32, codebook_size=256, code_width=32))
    drawn = {}
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            assert not weight.any(), name
        else:
            drawn[name] = weight.detach() * math.sqrt(weight[0].numel())  # in units of 1/√(c·k²)
    for name, weight in drawn.items():  # five sigma of a sample's standard deviation
        assert weight.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * weight.numel())), name
    assert torch.cat([w.flatten() for w in drawn.values()]).mean().abs() < 0.01


@pytest.mark.parametrize(("given", "gain"), [(None, 1 / 144), (0.5, 0.5), (0.0, 0.0)])
def test_residual_gain(given: float | None, gain: float) -> None:
    assert DVAEConfig(blocks_per_group=3, residual_gain=given).block_gain == gain
    block = Block(8, 8, [3, 3, 3, 1], gain)
    x = torch.randn(1, 8, 4, 4, generator=seeded())
    torch.testing.assert_close(block(x), x + gain * block.residual(x))


def test_logit_gain_and_floor_on_the_scale() -> None:
    plain = tiny()
    other = tiny(DVAEConfig(**{**vars(TINY), "logit_gain": 3.0, "min_log_scale": 0.2}))
    images = pictures()
    torch.testing.assert_close(other.logits(images), 3 * plain.logits(images))
    before = plain.decoder(plain.encode(images))
    after = other.decoder(plain.encode(images))
    assert before[:, 3:].min() < 0.2
    assert torch.equal(after[:, :3], before[:, :3])
    assert torch.equal(after[:, 3:], before[:, 3:].clamp_min(0.2))


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (1, 3, 16, 20), (1, 4, 16, 16), (3, 16, 16)])
def test_pictures_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = tiny()
    for use in (model.encode, lambda images: model(images, 1.0)):
        with pytest.raises(ValueError, match="multiples of 8") as error:
            use(torch.zeros(shape))
        assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 100},
        {"image_size": 0},
        {"width": 6},
        {"width": 0},
        {"blocks_per_group": 0},
        {"codebook_size": 0},
        {"code_width": 0},
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        DVAEConfig(**wrong)


# Codes


def test_codes_are_the_argmax_without_noise() -> None:
    model, images = tiny().train(), pictures(3)
    codes = model.encode(images)
    assert torch.equal(codes, model.logits(images).argmax(-1))
    for _ in range(3):
        torch.rand(7)  # the global generator has no say
        assert torch.equal(model.encode(images), codes)
    assert torch.equal(torch.cat([model.encode(x[None]) for x in images]), codes)
    assert len(codes.unique()) > 1


def test_decoding_codes_is_decoding_one_hot_weights() -> None:
    model = tiny()
    codes = torch.randint(20, (2, 3, 2), generator=seeded())
    stats = model.decoder(F.one_hot(codes, 20).float())
    torch.testing.assert_close(model.decoder(codes), stats)
    expected = ((stats[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(model.decode(codes), expected)
    for wrong in (codes.float(), codes[0]):
        with pytest.raises(ValueError, match=r"expected integers \[B, h, w\]"):
            model.decode(wrong)


def test_pixels_are_squeezed_and_back() -> None:
    images = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(squeeze_pixels(images), torch.tensor([0.1, 0.3, 0.9]))
    torch.testing.assert_close(unsqueeze_pixels(squeeze_pixels(images)), images)
    outside = unsqueeze_pixels(torch.tensor([0.01, 0.99]))
    assert outside.tolist() == [0.0, 1.0]


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


def test_cold_samples_occur_as_often_as_softmax_says() -> None:
    logits, count = torch.tensor([2.0, 1.0, 0.0, -1.0]), 20_000
    sample = gumbel_softmax(logits.expand(count, 4), 0.01, seeded())
    assert sample.max(-1).values.mean() > 0.98
    seen = sample.argmax(-1).bincount(minlength=4).double()
    expected = count * logits.double().softmax(-1)
    assert ((seen - expected) ** 2 / expected).sum() < 16.3  # χ² with 3 degrees: once in 1,000


def test_gradient_goes_through_the_relaxed_sample() -> None:
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
    images = pictures(count, height, width)
    stats = torch.randn(count, 6, height, width, generator=seeded(1))
    logits = 2 * torch.randn(count, height // 8, width // 8, 10, generator=seeded(2))
    return images, stats, logits


def test_loss_by_hand() -> None:
    images, stats = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 6, 8, 8)
    stats[:, :3], stats[:, 3:] = 1.0, math.log(2)
    logits = torch.tensor([0.5, 0.25, 0.25]).log().view(1, 1, 1, 3)
    loss = elbo_loss(images, stats, logits, beta=6.6, usage_weight=2.0)
    kl = math.log(3) - 1.5 * math.log(2)
    assert loss.nll.item() == pytest.approx(0.5, abs=1e-6)
    assert loss.kl.item() == pytest.approx(kl, abs=1e-6)
    assert loss.usage_gap.item() == pytest.approx(kl, abs=1e-6)  # one place is its own mean
    assert loss.total.item() == pytest.approx(0.5 + 8.6 * kl / 192, abs=1e-6)


def test_loss_does_not_depend_on_the_size_of_the_batch() -> None:
    parts = objective(3)
    once = elbo_loss(*parts, beta=6.6, usage_weight=1.0)
    twice = elbo_loss(*(torch.cat([x, x]) for x in parts), beta=6.6, usage_weight=1.0)
    for name, value in vars(once).items():
        assert getattr(twice, name).item() == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize(("height", "width"), [(256, 256), (8, 8), (16, 40)])
def test_beta_weighs_one_code_by_a_192nd_at_any_size(height: int, width: int) -> None:
    parts = objective(2, height, width)
    without = elbo_loss(*parts, beta=0.0)
    loss = elbo_loss(*parts, beta=192.0)
    assert loss.kl.item() > 0.5
    assert (loss.total - without.total).item() == pytest.approx(loss.kl.item(), rel=1e-4)
    used = elbo_loss(*parts, beta=0.0, usage_weight=192.0)
    assert (used.total - without.total).item() == pytest.approx(used.usage_gap.item(), rel=1e-3)


def test_each_part_of_the_loss_has_its_sign() -> None:
    images, stats, logits = objective()
    loss = elbo_loss(images, stats, logits, beta=1.0)
    nearer = stats.clone()
    nearer[:, :3] = torch.logit(squeeze_pixels(images))
    assert elbo_loss(images, nearer, logits, beta=1.0).nll < loss.nll
    assert 0 < loss.usage_gap < loss.kl  # the mean posterior is nearer to uniform than each is
    surer = elbo_loss(images, stats, 3 * logits, beta=1.0)
    assert surer.kl > loss.kl
    assert surer.total > loss.total


def test_psnr_by_hand() -> None:
    images = torch.zeros(2, 3, 4, 4)
    drawn = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert psnr(images, drawn).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert psnr(images, images).tolist() == pytest.approx([100, 100])  # capped, not infinite


def test_a_few_steps_lower_the_loss() -> None:
    model, images = tiny(), torch.tensor([0.0, 0.3, 0.6, 1.0]).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        stats, logits = model(images, 1.0, seeded(step))
        loss = elbo_loss(images, stats, logits, beta=0.1)
        loss.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.nll.item())
    print(losses)
    assert losses[-1] < losses[0] - 0.3


def test_evaluation() -> None:
    model, images = tiny(), pictures(5)
    numbers = evaluate(model, images, 1 / 16, batch_size=2)
    assert set(numbers) == {
        *("psnr_hard", "psnr_relaxed", "loss_hard", "loss_relaxed"),
        *("kl", "codes_used", "perplexity"),
    }
    codes = model.encode(images)
    loss = elbo_loss(images, model.decoder(codes), model.logits(images), beta=1.0)
    assert numbers["loss_hard"] == pytest.approx(loss.total.item(), rel=1e-5)
    assert numbers["kl"] == pytest.approx(loss.kl.item(), rel=1e-5)
    hard = psnr(images, model.decode(codes)).mean().item()
    assert numbers["psnr_hard"] == pytest.approx(hard, rel=1e-5)
    assert 3 < numbers["psnr_relaxed"] < 30
    assert math.isfinite(numbers["loss_relaxed"])
    shares = codes.flatten().bincount().double() / codes.numel()
    shares = shares[shares > 0]
    assert numbers["codes_used"] == len(shares) > 1
    perplexity = math.exp(-(shares * shares.log()).sum().item())
    assert numbers["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert evaluate(model, images, 1 / 16, batch_size=2) == numbers


# On disk


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_saved_and_loaded(tmp_path: Path, dtype: torch.dtype | None) -> None:
    config = DVAEConfig(**{**vars(TINY), "logit_gain": 2.0, "min_log_scale": -3.0})
    model = tiny(config).train()
    path = model.save(tmp_path / "deep" / "folder", dtype)
    assert [f.name for f in path.parent.iterdir()] == [FILE_NAME]
    loaded = DVAE.load(path.parent)
    assert loaded.config == config
    assert not loaded.training
    for name, weight in model.state_dict().items():
        expected = weight if dtype is None else weight.to(dtype).float()
        assert torch.equal(loaded.state_dict()[name], expected), name
        assert loaded.state_dict()[name].dtype == torch.float32
    with safe_open(path, "pt") as file:
        assert file.get_tensor("encoder.input.weight").dtype == (dtype or torch.float32)
        assert json.loads(file.metadata()["config"])["logit_gain"] == 2.0
    if dtype is None:
        assert torch.equal(loaded.encode(pictures()), model.encode(pictures()))


def config_of(**changes: object) -> dict[str, str]:
    return {"config": json.dumps({**vars(TINY), **changes})}


def test_what_is_no_dvae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no DVAE in .*expected the file dvae.safetensors"):
        DVAE.load(tmp_path)
    path = tiny().save(tmp_path)
    whole = path.read_bytes()
    weights = load(whole)  # in memory: a mapped file must not change

    def damage(kind: str) -> None:
        match kind:
            case "cut":
                path.write_bytes(whole[: len(whole) // 2])
            case "empty":
                path.write_bytes(b"")
            case "text":
                path.write_text("this is no model" * 20)
            case "no config":
                save_file(weights, path)
            case "unknown field":
                save_file(weights, path, metadata=config_of(colour="red"))
            case "impossible size":
                save_file(weights, path, metadata=config_of(width=6))
            case "other width":
                save_file(weights, path, metadata=config_of(width=16))
            case "missing weight":
                rest = {k: v for k, v in weights.items() if k != "decoder.output.bias"}
                save_file(rest, path, metadata=config_of())

    for kind in (
        *("cut", "empty", "text", "no config"),
        *("unknown field", "impossible size", "other width", "missing weight"),
    ):
        damage(kind)
        with pytest.raises(ValueError, match="is damaged, or holds no DVAE") as error:
            DVAE.load(tmp_path)
        assert str(path) in str(error.value), kind
        assert "\n" not in str(error.value), kind
