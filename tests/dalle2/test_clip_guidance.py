"""CLIP-guided sampling: its gradient, what it does to similarity, and that it can be turned off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_unclip import tiny_clip, tiny_decoder, tiny_unclip
from torch import Tensor

from dalle2.autoencoder import Pixels, PixelsConfig
from dalle2.clip_guidance import ClipGuide, similarity
from dalle2.diffusion.schedule import Schedule
from dalle2.options import UnclipOptions
from dalle2.pipeline import Unclip

PROMPT = "a red cube"


@pytest.fixture(scope="module")
def model() -> Unclip:
    found = tiny_unclip()
    # So far from each other that a step along the gradient counts.
    found.image_tokenizer.latent_std.fill_(20.0)
    found.clip.model.logit_scale.data.fill_(5.0)  # type: ignore[union-attr]
    return found


@pytest.fixture(params=["latents", "pixels"])
def guide(
    model: Unclip, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ClipGuide]:
    """A guide in float64, also where networks round to float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    autoencoder: Any = model.image_tokenizer
    if request.param == "pixels":
        autoencoder = Pixels(PixelsConfig(image_size=8))
    clip = model.encoder
    found = copy.deepcopy(autoencoder).double()
    text = clip.embed_text([PROMPT, "a blue star"]).double()
    clip.model.double()
    try:
        yield ClipGuide(
            clip=clip, autoencoder=found, schedule=Schedule("cosine", 10), text=text, weight=2.0
        )
    finally:
        clip.model.float()


def latents(model: Unclip, **how: Any) -> Tensor:
    options = {"num_candidates": 3, "embedding": "none", "steps": 3, "rerank": "none", **how}
    return torch.stack([c.codes for c in model.candidates(PROMPT, **options)])


def test_the_gradient_is_that_of_finite_differences(guide: ClipGuide) -> None:
    shape = (2, *guide.autoencoder.latent_shape)
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    found, step = guide.gradient(x0), 1e-6
    assert found.abs().max() > 1e-3
    for index in ((0, 0, 0, 0), (0, 2, 1, 1), (1, 1, 0, 1)):
        ends = []
        for sign in (1, -1):
            moved = x0.clone()
            moved[index] += sign * step
            ends.append(guide.log_probability(moved, guide.text))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(slope[index[0]]) == pytest.approx(float(found[index]), rel=1e-4, abs=1e-7)
        assert float(slope[1 - index[0]]) == 0  # no sample reads another
    moved = guide(x0, 7)
    torch.testing.assert_close(moved, x0 + 2 * guide.schedule.sigma(7) ** 2 * found)


def test_the_guided_image_is_the_one_that_clip_scores(model: Unclip) -> None:
    """The differentiable similarity is that of reranking, but for the 8 bits of an image."""
    codes = latents(model)
    images, clip = model.decode(codes), model.encoder
    text = clip.embed_text([PROMPT]).expand(3, -1)
    found = similarity(clip, model.image_tokenizer.reconstruct(codes), text)
    torch.testing.assert_close(found.detach(), clip.score(PROMPT, images), atol=0.02, rtol=0)


@pytest.mark.parametrize("sampler", ["dpm-solver", "ddim", "ancestral"])
def test_similarity_rises_with_every_sampler(model: Unclip, sampler: str) -> None:
    def score(weight: float) -> Tensor:
        codes = latents(model, clip_guidance=weight, sampler=sampler, steps=8)
        text = model.encoder.embed_text([PROMPT]).expand(3, -1)
        return similarity(model.encoder, model.image_tokenizer.decode(codes), text)

    plain, guided = score(0), score(0.3)
    assert (guided > plain + 1e-3).all()
    assert (score(-0.3) < plain).all()


def test_weight_0_is_off_and_candidates_stay_their_own(model: Unclip) -> None:
    assert latents(model, clip_guidance=0.0).equal(latents(model))
    together = latents(model, clip_guidance=0.5)
    assert not together.equal(latents(model))
    how = {"num_candidates": 3, "embedding": "none", "steps": 3, "clip_guidance": 0.5}
    alone = next(model.sample([PROMPT], share=(2, 3), **how))[0]
    torch.testing.assert_close(alone.codes, together[2], atol=1e-5, rtol=0)


def test_a_variance_that_is_learned_is_not_guided(model: Unclip) -> None:
    decoder = tiny_decoder(learns_variance=True, objective="epsilon", pixels=True)
    other = Unclip(model.image_tokenizer, decoder, model.encoder, clip=model.clip)
    found = latents(other, clip_guidance=0.5, sampler="ancestral")
    assert found.isfinite().all()
    assert found.abs().max() <= 1  # x₀ is clipped after it is guided


def test_a_clip_without_gradients_is_refused_in_one_line(model: Unclip) -> None:
    class Detached:
        """A tower whose results have no gradient, as of a quantized model."""

        def __init__(self, original: Any) -> None:
            self.original = original

        def __getattr__(self, name: str) -> Any:
            return getattr(self.original, name)

        def get_image_features(self, **inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return self.original.get_image_features(**inputs).pooler_output

    clip = tiny_clip()
    clip.model = Detached(clip.model)  # type: ignore[assignment]
    other = copy.copy(model)
    other.clip = clip
    message = r"the CLIP of clip_guidance cannot be differentiated \(.*\); use another --clip"
    with pytest.raises(ValueError, match=message):
        other.sample([PROMPT], clip_guidance=1.0)
    with pytest.raises(ValueError, match=r"clip_guidance is 1e\+30, and latents are nan"):
        latents(model, clip_guidance=1e30)
    with pytest.raises(ValueError, match="clip_guidance is nan, expected a finite number"):
        replace(UnclipOptions(), clip_guidance=float("nan"))
