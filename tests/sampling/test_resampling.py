"""The particle filter: who is copied, that copies continue by themselves, and what it samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from tiny_model import tiny_clip, tiny_model
from torch import Tensor

from dalle1 import DallE, pipeline
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling import batching
from dalle1.sampling.decoding import (
    DecodeState,
    candidate_uniforms,
    generate,
    null_caption,
)
from dalle1.sampling.filters import Sampling
from dalle1.sampling.generation import GenerationConfig
from dalle1.sampling.resampling import ClipRowScore, LikelihoodRowScore, Resampler, resampled

L, W, V = 5, 4, 11
TEXT = torch.tensor([[3, 1, 4, 16, 17], [2, 14, 15, 16, 17]])
SCALE = 1e5  # of a CLIP, so that the scores of its few images differ
KINDS = ("row", "column", "conv", "full")


@dataclass(frozen=True)
class Score:
    """Scores by a function of the codes [P, C, N] and the number of rows."""

    function: Callable[[Tensor, int], Tensor]
    compares: bool = False

    def __call__(self, state: DecodeState, rows: int) -> Tensor:
        return self.function(state.codes, rows)


def loud(**sizes: object) -> Transformer:
    """Return a model whose scores are far from uniform."""
    torch.manual_seed(0)
    size = {"text_vocab": 13, "text_len": L, "codebook_size": V, "grid_size": W, **sizes}
    masks = {"masks": list(KINDS), "depth": 4} if "depth" not in size else {}
    model = Transformer(TransformerConfig(width=16, heads=2, **size, **masks))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    return model.eval()


def prefers(candidate: int) -> Score:
    def function(codes: Tensor, rows: int) -> Tensor:
        return 50.0 * (torch.arange(codes.shape[1]) == candidate).expand(codes.shape[:2])

    return Score(function)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_all_become_copies_of_the_preferred_one_with_their_own_noise(guidance: float) -> None:
    """Each is what the model samples after the preferred rows, from its own random numbers."""
    model, sampling = loud(), Sampling(guidance=guidance)
    uniforms = candidate_uniforms(3, range(4), W * W)
    plain = generate(model, TEXT, uniforms, sampling)
    found = generate(model, TEXT, uniforms, sampling, resample=Resampler(prefers(2), 2, 0))
    for prompt, text in enumerate(TEXT):
        known = torch.full((W * W,), -1)
        known[: 2 * W] = plain[prompt, 2].flatten()[: 2 * W]
        expected = generate(model, text[None], uniforms, sampling, known_codes=known)[0]
        assert found[prompt].equal(expected)
        assert found[prompt, 2].equal(plain[prompt, 2])
        assert len({tuple(x.flatten().tolist()) for x in found[prompt]}) == 4


def test_prompts_are_resampled_by_themselves() -> None:
    model, uniforms = loud(), candidate_uniforms(3, range(4), W * W)

    def function(codes: Tensor, rows: int) -> Tensor:
        scores = torch.zeros(codes.shape[:2])
        scores[0, 1] = 50.0 * (rows == 1)
        return scores

    plain = generate(model, TEXT, uniforms)
    found = generate(model, TEXT, uniforms, resample=Resampler(Score(function), 1, 0))
    assert found[1].equal(plain[1])
    assert found[0, :, 0].equal(plain[0, 1, 0].expand(4, -1))
    assert not found[0].equal(plain[0])


def test_equal_weights_resample_nothing() -> None:
    model, uniforms = loud(), candidate_uniforms(3, range(6), W * W)
    plain = generate(model, TEXT, uniforms)
    for scale in (0.0, 0.1):  # weights that hardly differ wait until they do
        score = Score(lambda codes, rows, s=scale: s * codes[..., 0].float().sin())  # type: ignore[misc]
        assert generate(model, TEXT, uniforms, resample=Resampler(score, 1, 0)).equal(plain)


def test_a_candidate_is_chosen_in_proportion_to_its_weight() -> None:
    weights = torch.tensor([0.05, 0.0, 0.72, 0.02, 0.21], dtype=torch.float64)
    grid = 200
    counts = torch.zeros(5)
    for i in range(grid):
        chosen = resampled(weights, (i + 0.5) / grid)
        assert chosen is not None
        copies = torch.bincount(chosen, minlength=5)
        assert ((copies - 5 * weights).abs() < 1).all()
        survivors = copies.nonzero()[:, 0]
        assert chosen[survivors].equal(survivors)  # they keep their positions
        counts += copies
    torch.testing.assert_close(counts.double() / grid, 5 * weights, atol=2e-2, rtol=0)
    assert resampled(torch.full((5,), 0.2, dtype=torch.float64), 0.3) is None


def test_samples_follow_the_weighted_model() -> None:
    """By enumeration of all 81 images of 2 × 2 codes, with weights of rows that differ a lot."""
    model = loud(codebook_size=3, grid_size=2, depth=2)
    text, empty = TEXT[:1], null_caption(model)
    images = torch.tensor(list(product(range(3), repeat=4)))
    with torch.no_grad():
        each = [
            -model.losses(x.expand(len(images), -1), images.view(-1, 2, 2))[1]
            for x in (text, empty)
        ]
    own, gain = each[0].double().sum(1).exp(), (each[0] - each[1]).double()[:, :2].sum(1)
    count, scale = 8_000, 100  # captions hardly change what so small a model samples
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(count, 4, generator=generator)
    weights = torch.tensor([0.0, 3.0, 1.0])

    def function(codes: Tensor, rows: int) -> Tensor:
        return weights[codes[..., 0]]

    class Gain(LikelihoodRowScore):
        def __call__(self, state: DecodeState, rows: int) -> Tensor:
            return scale * super().__call__(state, rows)

    number = images @ torch.tensor([27, 9, 3, 1])
    for score, exact in ((Score(function), weights[images[:, 0]]), (Gain(), scale * gain)):
        ratio = exact.double().exp() / (own * exact.double().exp()).sum()
        resample = Resampler(score, 1, 0)
        found = generate(model, text, uniforms, resample=resample)[0].flatten(1)
        shares = torch.bincount(found @ torch.tensor([27, 9, 3, 1]), minlength=81) / count
        bound = 5 * (own * ratio * (ratio + 1) / count).sqrt() + 5 / count
        assert ((shares.double()[number] - own * ratio).abs() < bound).all()
        assert not ((own - own * ratio).abs() < bound).all()  # the weights count


def test_the_gain_is_that_of_the_whole_model() -> None:
    model, uniforms = loud(), candidate_uniforms(3, range(3), W * W)
    gains: list[tuple[Tensor, int]] = []

    class Noted(LikelihoodRowScore):
        def __call__(self, state: DecodeState, rows: int) -> Tensor:
            gains.append((super().__call__(state, rows).clone(), rows))
            return torch.zeros(state.codes.shape[:2])

    for guidance in (1.0, 3.0):
        gains.clear()
        resample = Resampler(Noted(), 1, 0)
        codes = generate(model, TEXT, uniforms, Sampling(guidance=guidance), resample=resample)
        assert codes.equal(generate(model, TEXT, uniforms, Sampling(guidance=guidance)))
        texts = TEXT.repeat_interleave(3, 0)
        with torch.no_grad():
            own, empty = (
                -model.losses(x, codes.flatten(0, 1))[1]
                for x in (texts, null_caption(model).expand(6, -1))
            )
        for found, rows in gains:
            expected = (own - empty)[:, : rows * W].sum(1).view(2, 3)
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def model() -> DallE:
    found = tiny_model(0.8)
    found.clip = tiny_clip(found.tokenizer)
    found.clip.model.logit_scale.data.fill_(math.log(SCALE))
    return found


def sampled(model: DallE, **how: object) -> Tensor:
    options = {"num_candidates": 12, "rerank": "none", **how}
    return torch.stack([c.codes for c in model.candidates("a red cube", **options)])


def test_clip_scores_unfinished_images(model: DallE) -> None:
    seen: list[Tensor] = []

    def decode(codes: Tensor) -> list:
        seen.append(codes)
        return model.decode(codes)

    state = type("State", (), {"model": model.transformer})()
    state.codes = torch.full((1, 2, 16), -1)
    state.codes[0, :, :4] = torch.tensor([[5, 5, 2, 5], [1, 9, 9, 9]])
    state.codes[0, :, 12:] = 7  # codes of an image that are kept
    assert model.clip is not None
    found = ClipRowScore(model.clip, ["a red cube"], decode)(state, 1)
    assert seen[0][:, 1:].flatten(1).tolist() == [[5] * 8 + [7] * 4, [9] * 8 + [7] * 4]
    assert seen[0][1, 0].tolist() == [1, 9, 9, 9]
    expected = SCALE * model.clip.score("a red cube", model.decode(seen[0]))
    torch.testing.assert_close(found[0], expected, atol=1e-2, rtol=1e-4)


def test_a_model_resamples_by_option_and_repeats_itself(model: DallE) -> None:
    plain = sampled(model)
    for by in ("clip", "likelihood"):
        found = sampled(model, resample=by, resample_every=1, seed=0)
        assert found.equal(sampled(model, resample=by, resample_every=1, batch_size=12))
        assert not found.equal(plain)
    prompts = ["a red cube", "a blue star"]
    how = {"num_candidates": 12, "rerank": "none", "resample": "likelihood", "resample_every": 1}
    for size in (12, 24):  # prompts in one batch or in two
        found = next(model.sample(prompts, batch_size=size, **how))  # type: ignore[arg-type,assignment]
        expected = sampled(model, resample="likelihood", resample_every=1)
        assert torch.stack([c.codes for c in found]).equal(expected)  # type: ignore[attr-defined]


def test_what_cannot_be_resampled_is_refused_in_one_line(model: DallE) -> None:
    without = tiny_model()
    for of, options, message in (
        (without, {"resample": "clip"}, "resample is clip, and this model has no CLIP; name one"),
        (model, {"resample": "judgement"}, "resample is 'judgement', expected clip or likelihood"),
        (model, {"resample_every": 0}, "resample_every is 0, expected at least 1"),
        (
            model,
            {"resample": "clip", "batch_size": 3},
            "batch_size is 3, expected at least num_candidates, 4: resample compares all",
        ),
        (model, {"resample": "clip", "share": (0, 2)}, "expected one process; run it without"),
        (
            model,
            {"resample": "clip", "resample_every": 4},
            "resample_every is 4, expected less than the model's 4 rows of codes",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            of.sample(["a"], num_candidates=4, **{"resample_every": 1, **options})  # type: ignore[arg-type]


def test_defaults_that_need_a_clip_are_not_those_of_a_model_without(model: DallE) -> None:
    by_clip = GenerationConfig(rerank="clip", resample="clip", resample_every=1)
    parts = model.image_tokenizer, model.transformer, model.tokenizer
    assert DallE(*parts, model.clip, generation=by_clip).generation == by_clip
    without = DallE(*parts, generation=by_clip)
    assert without.generation == GenerationConfig(resample_every=1)


def test_candidates_that_do_not_fit_in_memory_are_refused(
    model: DallE, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"num_candidates": 140, "resample": "likelihood", "resample_every": 1}
    model.sample(["a"], **how)  # type: ignore[arg-type]  # more than other batches hold
    with monkeypatch.context() as patched:
        patched.setattr(batching, "free_memory", lambda device: 100_000)
        with pytest.raises(ValueError, match="num_candidates is 140, expected fewer"):
            model.sample(["a"], **how)  # type: ignore[arg-type]

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pipeline, "generate", exhausted)
    with pytest.raises(ValueError, match="num_candidates is 140, and memory is exhausted"):
        next(model.sample(["a"], **how))  # type: ignore[arg-type]
