"""Drawing: cached is uncached, seeds are kept, and draws follow the distribution exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dalle1.attention import Cache, Mask
from dalle1.masks import MaskKind
from dalle1.sampler import candidate_uniforms, draw, generate, restrict
from dalle1.transformer import Transformer, TransformerConfig

L, W, V = 5, 4, 11
N = W**2
TEXT = torch.tensor([3, 1, 4, 16, 17])


def loud(kind: MaskKind | None = None) -> Transformer:
    """Give a model with opinions; of two layers of one kind, or of three as in the paper."""
    config = TransformerConfig(
        text_vocab=13,
        text_len=L,
        codebook_size=V,
        grid_size=W,
        width=16,
        depth=2 if kind else 3,
        heads=2,
    )
    model = Transformer(config).eval()
    if kind:
        model.kinds, model.masks = [kind] * 2, nn.ModuleDict({kind: Mask(kind, L, W)})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def caches(model: Transformer, batch: int) -> list[Cache]:
    like = model.norm.weight
    return [Cache(batch, model.config.heads, model.config.length, 8, like) for _ in model.layers]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "row", "column", "conv", None])
def test_cached_steps_give_the_logits_of_the_whole(kind: MaskKind | None) -> None:
    model = loud(kind)
    codes = torch.randint(V, (3, N), generator=torch.Generator().manual_seed(0))
    expected = model(TEXT.expand(3, L), codes)[1]
    steps = caches(model, 3)
    model.run(model.embed_text(TEXT[None]), steps)  # read once, shared by all three
    previous = torch.full((3, 1), V)
    for place in range(N):
        x = model.run(model.embed_codes(previous, place), steps, L + place)
        torch.testing.assert_close(
            model.image_head(x[:, 0]), expected[:, place], rtol=1e-4, atol=1e-5
        )
        previous = codes[:, place : place + 1]


@torch.no_grad()
def test_a_caption_read_once_is_read_for_all() -> None:
    model = loud()
    shared, repeated = caches(model, 3), caches(model, 3)
    model.run(model.embed_text(TEXT[None]), shared)
    model.run(model.embed_text(TEXT.expand(3, L)), repeated)
    for a, b in zip(shared, repeated, strict=True):
        torch.testing.assert_close(a.keys, b.keys)
        torch.testing.assert_close(a.values, b.values)
        assert a.keys[:, :, :L].abs().amin((1, 2, 3)).gt(0).all()
        assert (a.keys[:, :, L:] == 0).all()


@torch.no_grad()
def argmax_uncached(model: Transformer) -> Tensor:
    codes = torch.zeros(1, N, dtype=torch.long)
    for place in range(N):
        codes[0, place] = model(TEXT[None], codes)[1][0, place].argmax()
    return codes.view(1, W, W)


def test_the_likeliest_is_that_of_the_uncached_model() -> None:
    model = loud()
    expected = argmax_uncached(model)
    uniforms = candidate_uniforms(0, [0], N)
    assert torch.equal(generate(model, TEXT, uniforms, top_k=1), expected)
    assert torch.equal(generate(model, TEXT, uniforms, temperature=0), expected)
    assert torch.equal(generate(model, TEXT, uniforms, top_p=1e-9), expected)
    assert not torch.equal(generate(model, TEXT, uniforms), expected)


def test_drawing_is_that_of_the_uncached_model() -> None:
    model, uniforms = loud(), candidate_uniforms(3, [0], N)
    codes = generate(model, TEXT, uniforms, temperature=0.8, top_k=5, top_p=0.9).flatten(1)
    with torch.no_grad():
        logits = restrict(model(TEXT[None], codes)[1][0], 5, 0.9)
    assert torch.equal(draw(logits, uniforms[0], 0.8), codes[0])


def test_a_candidate_is_the_same_in_any_batch() -> None:
    model = loud()
    together = generate(model, TEXT, candidate_uniforms(7, range(5), N))
    assert together.shape == (5, W, W)
    assert len({tuple(c.flatten().tolist()) for c in together}) == 5
    assert torch.equal(together, generate(model, TEXT, candidate_uniforms(7, range(5), N)))
    for i in (0, 3):
        assert torch.equal(generate(model, TEXT, candidate_uniforms(7, [i], N))[0], together[i])
    mixed = generate(model, TEXT, candidate_uniforms(7, [4, 9, 1], N))
    assert torch.equal(mixed[[0, 2]], together[[4, 1]])
    assert not torch.equal(generate(model, TEXT, candidate_uniforms(8, [0], N))[0], together[0])


def test_uniforms_depend_on_seed_and_candidate_alone() -> None:
    many = candidate_uniforms(1, range(50), 200)
    assert many.shape == (50, 200)
    assert torch.equal(candidate_uniforms(1, [7], 200)[0], many[7])
    assert torch.equal(candidate_uniforms(1, [7], 9)[0], many[7, :9])
    assert not torch.equal(candidate_uniforms(2, [7], 200)[0], many[7])
    # (1, 11) is not (11, 1).
    assert not torch.equal(candidate_uniforms(1, [11], 9), candidate_uniforms(11, [1], 9))
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)


def test_rows_are_told_as_they_are_drawn() -> None:
    rows: list[int] = []
    generate(loud(), TEXT, candidate_uniforms(0, [0, 1], N), on_row=rows.append)
    assert rows == [1, 2, 3, 4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([0.3, -2.0, 1.7, 0.0, 0.9])
    count = 2000
    uniforms = (torch.arange(count) + 0.5) / count
    drawn = draw(logits.expand(count, 5), uniforms, temperature)
    assert (drawn.diff() >= 0).all()  # an inversion: larger numbers, later tokens
    expected = (logits / temperature).softmax(-1) * count
    assert (drawn.bincount(minlength=5) - expected).abs().max() <= 1


def test_what_is_excluded_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    # 1 itself: what the largest random number becomes when it is rounded to float32.
    for uniform, token in ((0.0, 1), (0.2, 1), (0.3, 3), (1 - 2**-24, 3), (1.0, 3)):
        assert draw(logits, torch.tensor([uniform])).item() == token


INF = math.inf
LOGITS = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]]).log()


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [1]),
        (3, 1.0, [0, 1, 3]),
        (4, 1.0, [0, 1, 2, 3, 4]),  # both of the last that tie
        (5, 1.0, [0, 1, 2, 3, 4]),
        (99, 1.0, [0, 1, 2, 3, 4]),
        (0, 1e-9, [1]),
        (0, 0.49, [1]),
        (0, 0.51, [1, 3]),
        (0, 0.74, [1, 3]),
        (0, 0.76, [0, 1, 3]),
        (0, 0.90, [0, 1, 2, 3]),  # of those that tie, the first
        (0, 0.95, [0, 1, 2, 3, 4]),
        (2, 0.6, [1]),  # the share is of what top_k leaves: 2/3 and 1/3
        (2, 0.7, [1, 3]),
    ],
)
def test_restrictions_by_hand(top_k: int, top_p: float, kept: list[int]) -> None:
    before = LOGITS.clone()
    result = restrict(LOGITS, top_k, top_p)
    assert result[0].isfinite().nonzero()[:, 0].tolist() == kept
    assert torch.equal(result[0, kept], LOGITS[0, kept])
    assert (result[0] == -INF).sum() == 5 - len(kept)
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(-1, 1.0), (0, 0.0), (0, -0.1), (0, 1.01), (0, math.nan)]
)
def test_impossible_restrictions_are_refused(top_k: int, top_p: float) -> None:
    with pytest.raises(ValueError, match=r"top_k at least 0 .* top_p above 0 and at most 1"):
        restrict(LOGITS, top_k, top_p)


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature is .*, expected at least 0"):
        draw(LOGITS, torch.tensor([0.5]), temperature)
