"""Sampling: seeds repeat, known codes come back, and samples follow the distribution exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling import decoding as sampler
from dalle1.sampling.captions import complete_text
from dalle1.sampling.decoding import (
    UNKNOWN,
    candidate_uniforms,
    generate,
    null_caption,
    sample_token,
)
from dalle1.sampling.filters import Sampling, filter_logits
from dalle1.sampling.guidance import Contrasts
from dalle1.sampling.packed_linear import PackedLinear, TransposedLinear, packed

L, W, V = 5, 4, 11
N = W**2
TEXT = torch.tensor([[3, 1, 4, 16, 17], [2, 14, 15, 16, 17]])
SOME = torch.full((N,), UNKNOWN)
SOME[[0, 1, 2, 5, 9, 15]] = torch.tensor([3, 0, 10, 7, 7, 1])
TOP = torch.cat([torch.arange(6), torch.full((N - 6,), UNKNOWN)])


def loud() -> Transformer:
    """Return a model whose scores are far from uniform."""
    config = TransformerConfig(
        text_vocab=13, text_len=L, codebook_size=V, grid_size=W, width=16, depth=3, heads=2
    )
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def uncached(
    model: Transformer,
    text: Tensor,
    uniforms: Tensor,
    sampling: Sampling,
    known: Tensor | None = None,
    empty: Tensor | None = None,
    weights: Sequence[tuple[Tensor, float]] = (),
) -> Tensor:
    """Sample one caption's candidates, computing the whole stream for every code."""
    codes = torch.zeros(len(uniforms), N, dtype=torch.long)
    text = text.expand(len(uniforms), L)
    for position in range(N):
        logits = own = model(text, codes)[1][:, position]
        if sampling.guidance != 1:
            other = null_caption(model) if empty is None else empty
            without = model(other.expand_as(text), codes)[1][:, position]
            logits = without + sampling.guidance * (own - without)
        for other, strength in weights:
            without = model(other.expand_as(text), codes)[1][:, position]
            logits = logits + strength * (own - without)
        codes[:, position] = sample_token(logits, uniforms[:, position], sampling)
        if known is not None and known[position] != UNKNOWN:
            codes[:, position] = known[position]
    return codes.view(-1, W, W)


@pytest.mark.parametrize("known", [None, TOP, SOME], ids=["free", "top", "some"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 3.0},
        {"guidance": 0.0},
        {"temperature": 0.0},
        {"top_k": 1},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "typical": 0.9, "guidance": 1.5},
    ],
    ids=str,
)
def test_sampling_matches_the_uncached_model(
    options: dict[str, float], known: Tensor | None
) -> None:
    model, uniforms, sampling = loud(), candidate_uniforms(3, range(4), N), Sampling(**options)
    together = generate(model, TEXT, uniforms, sampling, known_codes=known)
    assert together.shape == (2, 4, W, W)
    for text, codes in zip(TEXT, together, strict=True):
        assert torch.equal(codes, uncached(model, text, uniforms, sampling, known))
    if known is not None:
        kept = known != UNKNOWN
        assert (together.flatten(2)[..., kept] == known[kept]).all()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("window", [1, 3])
def test_negative_prompts_and_weights_match_the_uncached_model(
    guidance: float, window: int
) -> None:
    model, uniforms, sampling = (
        loud(),
        candidate_uniforms(3, range(3), N),
        Sampling(guidance=guidance),
    )
    others, negative = torch.stack([TEXT.flip(0), TEXT.roll(1, 1) % 13]), TEXT[:1].flip(1) % 13
    strengths = torch.tensor([[0.5, 0.0], [-1.5, 2.0]])
    sampled = generate(
        model, TEXT, uniforms, sampling, empty=negative, window=window,
        contrasts=Contrasts(text=others, strengths=strengths),
    )  # fmt: skip
    for i, text in enumerate(TEXT):
        weights = list(zip(others[:, i], strengths[:, i].tolist(), strict=True))
        expected = uncached(model, text, uniforms, sampling, empty=negative, weights=weights)
        assert torch.equal(sampled[i], expected)
    assert not torch.equal(sampled, generate(model, TEXT, uniforms, sampling))


def test_a_fully_known_image_comes_back_and_nonsense_is_refused() -> None:
    codes = torch.arange(N) % V
    sampled = generate(loud(), TEXT, candidate_uniforms(0, range(3), N), known_codes=codes)
    assert torch.equal(sampled, codes.view(W, W).expand(2, 3, W, W))
    uniforms = candidate_uniforms(0, [0], N)
    for wrong in (codes[1:], codes[:0], codes + 1, codes - 2, codes.float()):
        with pytest.raises(ValueError, match=rf"expected \[{N}\] integers"):
            generate(loud(), TEXT, uniforms, known_codes=wrong)
    for text in (TEXT[0], TEXT[:, 1:], TEXT + 1, TEXT - 9):
        with pytest.raises(ValueError, match=rf"got text .*, expected \[P, {L}\], 0 to 17"):
            generate(loud(), text, uniforms)
    with pytest.raises(ValueError, match=rf"got uniforms .*, expected \[C, {N}\]"):
        generate(loud(), TEXT, uniforms[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_have_the_same_scores_and_do_not_change_the_model(
    dtype: torch.dtype,
) -> None:
    model = loud().to(dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    twin = packed(model, 3)
    here = torch.backends.mkldnn.is_available()
    if dtype == torch.bfloat16:
        here = here and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not here:
        assert twin is model
        return
    kind = TransposedLinear if dtype == torch.float32 else PackedLinear
    assert isinstance(twin.layers[0].mlp.branch.up, kind)
    if dtype == torch.float32:
        large = torch.nn.Linear(2**10, 2**10)
        packed_large = packed(torch.nn.Sequential(large), 3)[0]
        assert isinstance(packed_large, PackedLinear)
        y = torch.randn(3, 2**10, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(packed_large(y), large(y))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for layer, packed_layer in zip(model.layers, twin.layers, strict=True):
        torch.testing.assert_close(packed_layer.mlp(x), layer.mlp(x))
    torch.testing.assert_close(twin.image_head(x), model.image_head(x))
    assert twin.text_embedding.weight is model.text_embedding.weight
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert packed(loud().double(), 3).image_head.weight.dtype == torch.float64  # left as it is
    codes = generate(model, TEXT, candidate_uniforms(0, range(3), N))
    assert codes.unique().numel() > 3


def test_guidance_changes_the_scores_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, uniforms = loud(), candidate_uniforms(0, [0], N)
    plain = generate(model, TEXT[:1], uniforms)
    assert torch.equal(plain, generate(model, TEXT[:1], uniforms, Sampling(guidance=1.0)))
    seen: list[Tensor] = []
    monkeypatch.setattr(sampler, "packed", lambda model, _: model)  # keeps the hook
    model.image_head.register_forward_hook(lambda *a: seen.append(a[2]))
    generate(model, TEXT[:1], uniforms, Sampling(guidance=2.0), known_codes=plain.flatten())
    assert not seen  # nothing is free, nothing is computed
    generate(model, TEXT[:1], uniforms, Sampling(guidance=2.0), window=1)
    assert len(seen) == N
    for both in seen:
        conditional, unconditional = both
        assert not torch.allclose(conditional, unconditional)


def test_a_candidate_is_the_same_in_any_batch() -> None:
    model = loud()
    together = generate(model, TEXT, candidate_uniforms(7, range(5), N))
    for of_prompt in together:
        assert len({tuple(c.flatten().tolist()) for c in of_prompt}) == 5
    assert not torch.equal(*together)
    for i in (0, 3):
        alone = generate(model, TEXT[1:], candidate_uniforms(7, [i], N))
        assert torch.equal(alone[0, 0], together[1, i])
    mixed = generate(model, TEXT[:1], candidate_uniforms(7, [4, 9, 1], N))
    assert torch.equal(mixed[0, [0, 2]], together[0, [4, 1]])
    other = generate(model, TEXT[:1], candidate_uniforms(8, [0], N))
    assert not torch.equal(other[0, 0], together[0, 0])


def test_sampled_images_follow_the_model() -> None:
    # The first two codes of 6,000 candidates: as frequent as predicted, within four deviations.
    model, count = loud(), 6_000
    known = torch.zeros(N, dtype=torch.long)
    known[:2] = UNKNOWN
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(count, N, generator=generator)
    first, second = generate(model, TEXT[:1], uniforms, known_codes=known)[0].flatten(1)[:, :2].T
    codes = torch.zeros(V, N, dtype=torch.long)
    codes[:, 0] = torch.arange(V)
    with torch.no_grad():
        p = model(TEXT[:1].expand(V, L), codes)[1].softmax(-1)
    expected = count * (p[0, 0][:, None] * p[:, 1])
    found = (first * V + second).bincount(minlength=V**2).view(V, V)
    assert ((found - expected).abs() <= 4 * expected.sqrt() + 2).all()


def test_captions_are_continued_by_tokens_that_fit() -> None:
    model, uniforms = loud(), candidate_uniforms(0, range(40), L)
    begun = torch.tensor([3, 1, *range(15, 18)])
    done = complete_text(model, begun, uniforms)
    assert done.shape == (40, L)
    assert (done[:, :2] == begun[:2]).all()
    pads = null_caption(model)[0]
    ends = (done == pads).int()
    assert ((done < 13) | (done == pads)).all()
    assert (ends.diff(dim=1) >= 0).all()  # after the end only padding
    assert ends[:, -1].all()  # of which there is one in every caption
    assert 0 < ends.sum() < ends.numel()
    likeliest = complete_text(model, begun, uniforms[:1], Sampling(temperature=0))[0]
    for position in range(2, L - 1):
        if likeliest[position] == pads[position]:
            break
        with torch.no_grad():
            scores = model(likeliest[None], torch.zeros(1, N, dtype=torch.long))[0][0, position]
        scores[13:] = torch.where(torch.arange(L) == position, scores[13:], -math.inf)
        assert likeliest[position] == scores.argmax()


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


def test_rows_are_reported_as_they_are_sampled() -> None:
    rows: list[tuple[int, int]] = []

    def on_row(codes: Tensor, done: int) -> None:
        assert codes.shape == (2, 3, N)
        rows.append((done, int((codes != UNKNOWN).sum())))

    uniforms = candidate_uniforms(0, range(3), N)
    generate(loud(), TEXT, uniforms, on_row=on_row)
    assert rows == [(1, 24), (2, 48), (3, 72), (4, 96)]
    rows.clear()
    generate(loud(), TEXT, uniforms, known_codes=TOP, on_row=on_row)
    assert [done for done, _ in rows] == [2, 3, 4]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([0.3, -2.0, 1.7, 0.0, 0.9])
    count = 2000
    uniforms = (torch.arange(count) + 0.5) / count
    sampled = sample_token(logits.expand(count, 5), uniforms, Sampling(temperature=temperature))
    assert (sampled.diff() >= 0).all()  # an inversion: larger numbers, later tokens
    expected = (logits / temperature).softmax(-1) * count
    assert (sampled.bincount(minlength=5) - expected).abs().max() <= 1


def test_excluded_tokens_are_never_sampled() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    # 1 itself: what the largest random number becomes when it is rounded to float32.
    for uniform, token in ((0.0, 1), (0.2, 1), (0.3, 3), (1 - 2**-24, 3), (1.0, 3)):
        assert sample_token(logits, torch.tensor([uniform])).item() == token


INF = math.inf
LOGITS = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]]).log()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 4}, [0, 1, 2, 3, 4]),  # both of the last that tie
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.49}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.74}, [1, 3]),
        ({"top_p": 0.76}, [0, 1, 3]),
        ({"top_p": 0.90}, [0, 1, 2, 3]),  # of those that tie, the first
        ({"top_p": 0.95}, [0, 1, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # the share is of what top_k leaves: 2/3 and 1/3
        ({"top_k": 2, "top_p": 0.7}, [1, 3]),
        # The entropy is 1.875 bits; their surprises, 3, 1, 4, 2 and 4, are 1.125, 0.875, 2.125,
        # 0.125 and 2.125 from it.
        ({"typical": 0.2}, [3]),
        ({"typical": 0.26}, [1, 3]),
        ({"typical": 0.76}, [0, 1, 3]),
        ({"typical": 0.9}, [0, 1, 2, 3]),
        ({"typical": 0.76, "top_p": 0.5}, [1]),
        ({"top_k": 1, "typical": 0.5}, [1]),
    ],
    ids=str,
)
def test_filters_by_hand(options: dict[str, float], kept: list[int]) -> None:
    before = LOGITS.clone()
    result = filter_logits(LOGITS, Sampling(**options))
    assert result[0].isfinite().nonzero()[:, 0].tolist() == kept
    assert torch.equal(result[0, kept], LOGITS[0, kept])
    assert (result[0] == -INF).sum() == 5 - len(kept)
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k is -1, expected at least 0"),
        *(({"top_p": p}, r"top_p is .*, expected above 0") for p in (0.0, -0.1, 1.01)),
        *(({"top_p": p}, r"top_p is .*, expected a finite") for p in (INF, -INF, math.nan)),
        ({"typical": 0.0}, "typical is 0.0, expected above 0"),
        *(({"temperature": t}, "temperature is .*, expected") for t in (-1.0, math.nan, INF)),
        *(({"guidance": g}, "guidance is .*, expected") for g in (-1.0, math.nan, INF)),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("known", [None, TOP, SOME], ids=["free", "top", "some"])
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance": 3.0}, {"guidance": 0.0}, {"top_k": 5, "top_p": 0.9, "typical": 0.9}],
    ids=str,
)
def test_a_cuda_graphed_step_samples_what_a_cpu_samples(
    options: dict[str, float], known: Tensor | None
) -> None:
    uniforms, sampling = candidate_uniforms(3, range(4), N), Sampling(**options)
    expected = generate(loud(), TEXT, uniforms, sampling, known_codes=known)
    found = generate(loud().cuda(), TEXT.cuda(), uniforms, sampling, known_codes=known)
    assert torch.equal(found.cpu(), expected)
