"""Autoencoder, U-Net and prior with tiny random weights: what depends on what, what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_unclip import randomized
from torch import Tensor, nn

from dalle2.ar_prior import RANGE, ARPrior, ARPriorConfig
from dalle2.autoencoder import Autoencoder, AutoencoderConfig
from dalle2.conditioning import Caption
from dalle2.decoder import decoder_denoiser, sample_latents
from dalle2.diffusion.objective import mean_squared_error
from dalle2.prior import DiffusionPrior, PriorConfig
from dalle2.unet import UNet, UNetConfig, norm
from dalle2.upsampler import Upsampler, UpsamplerConfig, blurred, reduced
from dvae import DVAE, DVAEConfig

D, W = 6, 10
TINY = {"image_size": 16, "width": 4, "code_width": 8}


def tiny_unet(**changes: Any) -> UNet:
    sizes = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4, 2), "head_width": 8}
    sizes |= {"channels": 2, "side": 4, "embedding_width": D, "text_width": W, **changes}
    return randomized(UNet(UNetConfig(**sizes)))


def tiny_prior() -> DiffusionPrior:
    config = PriorConfig(width=16, depth=2, heads=2, embedding_width=D, text_width=W)
    return randomized(DiffusionPrior(config))


def captions(count: int, seed: int = 0) -> Caption:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 4, 2])[:count, None]
    embedding = nn.functional.normalize(torch.randn(count, D, generator=rng), dim=1)
    ids = torch.randint(20, (count, 5), generator=rng)
    return Caption(torch.randn(count, 5, W, generator=rng), mask, embedding, ids)


def unit(count: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, D, generator=rng), dim=1)


X = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
T = torch.tensor([0, 100, 500, 999])
ALL, NONE = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)


@torch.no_grad()
def test_a_dropped_condition_reaches_no_inlet_of_the_decoder() -> None:
    model = tiny_unet()

    def predicted(z: int, text: int, keep_z: Tensor, keep_text: Tensor) -> Tensor:
        context = model.condition(unit(4, z), captions(4, text), keep_z, keep_text)
        return model(X, T, context)

    assert not predicted(0, 0, ALL, ALL).equal(predicted(1, 0, ALL, ALL))
    assert not predicted(0, 0, ALL, ALL).equal(predicted(0, 1, ALL, ALL))
    assert predicted(0, 0, NONE, ALL).equal(predicted(1, 0, NONE, ALL))
    assert predicted(0, 0, ALL, NONE).equal(predicted(0, 1, ALL, NONE))
    null = predicted(0, 0, NONE, NONE)
    assert null.equal(predicted(1, 1, NONE, NONE))
    context = model.condition(unit(4, 0), captions(4), NONE, NONE)
    assert not model(X + 1, T, context).allclose(null)  # the null branch still reads x_t


@torch.no_grad()
def test_padding_and_other_samples_do_not_change_a_prediction() -> None:
    model, z, text = tiny_unet(), unit(4, 0), captions(4)
    batch = model(X, T, model.condition(z, text, ALL, ALL))
    for i in range(4):
        states = text.states[i : i + 1, : int(text.mask[i].sum())]
        alone = Caption(states, text.mask[i : i + 1, : states.shape[1]], z[i : i + 1])
        context = model.condition(z[i : i + 1], alone, ALL[:1], ALL[:1])
        torch.testing.assert_close(model(X[i : i + 1], T[i : i + 1], context), batch[i : i + 1])


def test_a_new_unet_predicts_nothing_and_learns_in_every_parameter() -> None:
    torch.manual_seed(0)
    model = UNet(tiny_unet().config)
    text = captions(4)
    context = model.condition(unit(4, 0), text, ALL.clone().logical_and(T > 0), ALL)
    assert model(X, T, context).eq(0).all()
    randomized(model)
    context = model.condition(unit(4, 0), text, T > 0, ALL)
    before = text.states.clone(), X.clone()
    mean_squared_error(model(X, T, context), X).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert text.states.equal(before[0])
    assert X.equal(before[1])


@torch.no_grad()
def test_decoder_candidates_are_the_same_in_any_batch_and_guidance_1_is_none() -> None:
    model, z, text = tiny_unet(), unit(1, 0), captions(1)

    def latents(candidates: list[int], guidance: float = 1.0, **how: Any) -> Tensor:
        count = len(candidates)
        denoise = decoder_denoiser(
            model, z.expand(count, -1), text.repeat(count), guidance=guidance
        )
        return sample_latents(model, denoise, candidates, seed=5, steps=4, **how)

    batch = latents([0, 1, 2])
    torch.testing.assert_close(latents([2])[0], batch[2])
    assert not latents([0, 1, 2], guidance=3.0).allclose(batch)
    plain = decoder_denoiser(model, z, text)
    times = torch.full((1,), 500)
    expected = model(X[:1], times, model.condition(z, text, ALL[:1], ALL[:1]))
    assert plain.predict(X[:1], times).equal(expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 12}, "width is 12, expected a multiple of 8"),
        ({"head_width": 5}, r"head_width is 5, expected a divisor of \[8, 16\]"),
        ({"side": 5}, "side is 5, expected a multiple of 2 for 2 levels"),
        ({"blocks": 0}, "blocks is 0, expected at least 1"),
        ({"group_width": 0}, "group_width is 0, expected at least 1"),
        ({"multipliers": ()}, r"multipliers is \(\), expected numbers of at least 1"),
    ],
)
def test_unets_that_cannot_be_built_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_unet(**sizes)


@torch.no_grad()
def test_channels_that_are_normalized_together_keep_their_means() -> None:
    x = torch.randn(2, 32, 4, 4)
    shifted = x + 3 * (torch.arange(32) == 0)[:, None, None]
    torch.testing.assert_close(norm(32)(shifted), norm(32)(x), atol=1e-4, rtol=1e-4)
    assert (norm(32, 8)(shifted) - norm(32, 8)(x))[:, 0].mean() > 0.5
    assert [norm(channels, 8).num_groups for channels in (8, 24, 64, 256, 320)] == [1, 3, 8, 32, 32]
    for group_width, groups in ((1, {8, 16}), (8, {1, 2})):
        modules = tiny_unet(group_width=group_width).down.modules()
        assert {m.num_groups for m in modules if isinstance(m, torch.nn.GroupNorm)} == groups


@torch.no_grad()
def test_a_dropped_caption_reaches_no_inlet_of_the_prior() -> None:
    model, x = tiny_prior(), torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    first, second = captions(4), captions(4, seed=1)
    assert not model(x, T, first).allclose(model(x, T, second))
    null = model(x, T, first.where(NONE))
    torch.testing.assert_close(model(x, T, second.where(NONE)), null)
    assert not model(x + 1, T, first.where(NONE)).allclose(null)
    for i in range(4):
        row = slice(i, i + 1)
        length = int(first.mask[i].sum())
        alone = Caption(first.states[row, :length], first.mask[row, :length], first.embedding[row])
        torch.testing.assert_close(model(x[row], T[row], alone), model(x, T, first)[row])


def test_a_prior_interpolates_the_errors_that_were_measured(tmp_path: Path) -> None:
    model = tiny_prior()
    assert model.error_at(500) == 0
    model.measure(torch.tensor([10, 60, 950]), torch.tensor([0.1, 0.3, 0.8]))
    assert len(model.config.errors) == 10
    assert model.error_at(0) == 0
    assert model.error_at(25) == pytest.approx(0.1)
    assert model.error_at(50) == pytest.approx(0.2)
    assert model.error_at(500) == pytest.approx(0.4)  # that of all
    assert model.error_at(999) == pytest.approx(0.8)
    before = tiny_prior().sample(captions(1), [0])
    assert not torch.equal(model.sample(captions(1), [0]), before)
    model.save(tmp_path)
    assert DiffusionPrior.load(tmp_path).config == model.config


def test_prior_samples_are_unit_vectors_and_the_better_of_two() -> None:
    model, text = tiny_prior(), captions(2)
    one = model.sample(text, [0, 1, 2], steps=3, samples=1)
    two = model.sample(text, [0, 1, 2], steps=3, samples=2)
    assert one.shape == (2, 3, D)
    torch.testing.assert_close(two.norm(dim=-1), torch.ones(2, 3))
    fits = [(z @ text.embedding[..., None])[..., 0] for z in (one, two)]
    assert (fits[1] >= fits[0] - 1e-6).all()
    assert not two.equal(one)
    torch.testing.assert_close(model.sample(text, [2], steps=3)[:, 0], two[:, 2])
    with pytest.raises(ValueError, match="samples is 0, expected at least 1"):
        model.sample(text, [0], samples=0)


def tiny_ar_prior(**sizes: Any) -> ARPrior:
    sizes = {"width": 16, "depth": 1, "heads": 2, "buckets": 64, "text_len": 6, **sizes}
    config = ARPriorConfig(**{"grid_size": 2, "embedding_width": D, "text_vocab": 20, **sizes})
    model = randomized(ARPrior(config))
    model.axes.copy_(torch.eye(*model.axes.shape))  # until `fit` is called
    return model


def test_codes_are_projections_on_the_main_axes() -> None:
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 3.0, 0.2, 2.0, 0.3, 1.0])
    z, text = torch.randn(4000, D, generator=rng) * spread + 5, captions(4).embedding
    text = text.repeat(1000, 1)
    model = tiny_ar_prior()
    model.fit(z, text)
    torch.testing.assert_close(model.axes.abs().argmax(1), torch.tensor([1, 3, 5]))
    torch.testing.assert_close(model.std, torch.tensor([3.0, 2.0, 1.0]), atol=0.1, rtol=0)
    codes = model.encode(z, text)
    assert codes.shape == (4000, 4)
    projected = (z - z.mean(0)) @ model.axes.T / model.std
    inside, middle = projected.abs().amax(1) < RANGE, projected[:, 0]
    edges = (codes[:, 1] / 64 * 2 - 1) * RANGE
    assert ((middle - edges)[inside] > -1e-3).all()
    assert ((middle - edges)[inside] < 2 * RANGE / 64 + 1e-3).all()
    fine = tiny_ar_prior(buckets=4096)
    fine.fit(z, text)
    kept = fine.decode(fine.encode(z, text))
    near = nn.functional.normalize(z.mean(0) + (z - z.mean(0)) @ fine.axes.T @ fine.axes, dim=1)
    torch.testing.assert_close(kept[inside], near[inside], atol=5e-3, rtol=0)


def test_dropped_captions_are_padding_and_candidates_are_their_own() -> None:
    model, text = tiny_ar_prior(), captions(2)
    tokens = model.tokens(text.where(torch.tensor([True, False])))
    assert tokens[0, :5].equal(text.ids[0])  # type: ignore[index]
    assert tokens[1].equal(torch.arange(20, 26))
    batch = model.sample(text, [0, 1, 2], seed=3)
    torch.testing.assert_close(model.sample(text, [2], seed=3)[:, 0], batch[:, 2])
    assert not model.sample(text, [0, 1, 2], seed=3, guidance=4.0).allclose(batch)
    assert model.sample(text, [0], samples=2).shape == (2, 1, D)


def test_the_first_code_is_sampled_from_the_upper_half(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def generated(model: object, text: Tensor, uniforms: Tensor, how: object) -> Tensor:
        seen.append(uniforms)
        return torch.zeros(len(text), len(uniforms), 2, 2, dtype=torch.long)

    monkeypatch.setattr("dalle2.ar_prior.generate", generated)
    tiny_ar_prior().sample(captions(1), range(50))
    assert (seen[0][:, 0] >= 0.5).all()
    assert seen[0][:, 1].min() < 0.5


def test_more_components_than_an_embedding_has_are_refused() -> None:
    with pytest.raises(ValueError, match="grid_size is 3, which makes 8 components, expected at"):
        tiny_ar_prior(grid_size=3)


def test_scaled_embeddings_have_the_variance_of_pixels() -> None:
    config = PriorConfig(width=16, depth=1, heads=2, embedding_width=128, text_width=W)
    assert DiffusionPrior(config).scale == pytest.approx(6.08, abs=0.01)


def test_latents_are_normalized_and_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Autoencoder(AutoencoderConfig(**TINY)).eval(), torch.rand(8, 3, 16, 16)
    assert model.latent_shape == (4, 2, 2)
    before = model.decode(model.encode(images))
    model.measure(images)
    latents = model.encode(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(model.encode(images)), before)
    model.save(tmp_path)
    loaded = Autoencoder.load(tmp_path)
    assert loaded.encode(images).equal(model.encode(images))
    with pytest.raises(ValueError, match=r"latents are \(1, 3, 2, 2\), expected \[B, 4, h, w\]"):
        model.decode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"images are \(1, 3, 20, 16\), expected"):
        model.encode(torch.zeros(1, 3, 20, 16))


def test_the_kl_is_that_of_normal_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = Autoencoder(AutoencoderConfig(**TINY)), torch.rand(2, 3, 16, 16)
    mean, log_variance = torch.full((2, 4, 2, 2), 0.5), torch.full((2, 4, 2, 2), -1.0)
    monkeypatch.setattr(model, "posterior", lambda images: (mean, log_variance))
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.5, torch.tensor(-0.5).exp()), torch.distributions.Normal(0, 1)
    )
    loss = model.loss(images, kl_weight=2.0, mse_weight=3.0)
    assert float(loss.kl) == pytest.approx(float(wanted))
    share = mean.numel() / images.numel()
    assert loss.total.item() == pytest.approx(
        (loss.distortion + 3 * loss.mse + 2 * loss.kl * share).item()
    )


def test_an_autoencoder_takes_over_the_groups_of_a_dvae() -> None:
    torch.manual_seed(0)
    sizes = {**TINY, "blocks_per_group": 1, "residual_gain": 0.25}
    dvae = DVAE(DVAEConfig(codebook_size=32, **sizes))
    model = Autoencoder.from_dvae(dvae, latent_channels=4)
    for name in ("encoder.groups.0.0.residual.conv_1.weight", "decoder.output.bias"):
        assert model.state_dict()[name].equal(dvae.state_dict()[name])
    assert model.encoder.output.weight.shape[0] == 8
    assert model.decode(model.encode(torch.rand(1, 3, 16, 16))).shape == (1, 3, 16, 16)


def tiny_upsampler(**sizes: Any) -> Upsampler:
    sizes = {"width": 8, "multipliers": (1, 2), "blocks": 1, "image_size": 16, **sizes}
    return randomized(Upsampler(UpsamplerConfig(**sizes)))


@torch.no_grad()
def test_an_upsampler_reads_the_small_image_at_any_size() -> None:
    model, small = tiny_upsampler(), torch.rand(3, 3, 8, 6)
    upsampled = model.upsample(small, [0, 1, 2], seed=4, steps=3)
    assert upsampled.shape == (3, 3, 16, 12)
    assert 0 <= upsampled.min() < upsampled.max() <= 1
    alone = model.upsample(small[2:], [2], seed=4, steps=3)
    torch.testing.assert_close(alone[0], upsampled[2])
    x, t = torch.randn(1, 3, 16, 12), torch.tensor([500])
    assert not model(x, t, small[:1]).equal(model(x, t, small[1:2]))
    deep = tiny_upsampler(multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match="upsampled images are 18 × 14, expected multiples of 4"):
        deep.upsample(torch.rand(1, 3, 9, 7), [0])


def test_small_images_are_means_of_pixels_and_the_blur_keeps_the_mean() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert reduced(images, 2)[0, 0].equal(torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    dot = torch.zeros(1, 3, 5, 5)
    dot[:, :, 2, 2] = 1
    spread = blurred(dot)
    torch.testing.assert_close(spread.sum((2, 3)), torch.ones(1, 3))
    edge = torch.tensor(-1 / (2 * 0.6**2)).exp()
    assert float(spread[0, 0, 2, 2]) == pytest.approx(float(1 / (1 + 2 * edge)) ** 2)
    torch.testing.assert_close(spread, spread.transpose(2, 3))
    torch.testing.assert_close(blurred(torch.ones(1, 3, 4, 4)), torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"attention": (8,), "head_width": 8}, r"attention is \(8,\), expected none"),
        ({"factor": 1}, "factor is 1, expected a divisor of image_size, 16, from 2 up"),
        ({"factor": 3}, "factor is 3, expected a divisor of image_size"),
    ],
)
def test_upsamplers_that_cannot_be_built_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_upsampler(**sizes)
