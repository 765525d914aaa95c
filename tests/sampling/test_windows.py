"""Windows of codes: Jacobi iteration samples what sequential decoding samples, in fewer passes."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from dalle1.model.masks import MaskKind
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling import decoding
from dalle1.sampling.decoding import UNKNOWN, candidate_uniforms, generate, pick_window
from dalle1.sampling.filters import Sampling
from dalle1.sampling.fused_step import fused

L, W, V = 5, 5, 11
N = W**2
TEXT = torch.tensor([[3, 1, 4, 16, 17], [2, 14, 15, 16, 17]])
SOME = torch.full((N,), UNKNOWN)
SOME[[0, 1, 2, 7, 8, 14, 24]] = torch.tensor([3, 0, 10, 7, 7, 1, 2])
TOP = torch.cat([torch.arange(7), torch.full((N - 7,), UNKNOWN)])
KINDS = get_args(MaskKind)


def loud(**changes: object) -> Transformer:
    """Return a model in fp64, whose scores are far from uniform."""
    config = TransformerConfig(
        text_vocab=13, text_len=L, codebook_size=V, grid_size=W, width=16, depth=2, heads=2
    )
    model = Transformer(dataclasses.replace(config, **changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.double()


MODELS: list[dict[str, object]] = [
    *({"masks": (kind, kind)} for kind in KINDS),
    {"depth": 3, "conv_wrap": False},
    {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "qk_norm": True},
    {"image_start": "text", "mlp": "gelu-tanh"},
    {"image_start": "none", "positions": "flat", "sandwich": True, "head_norm": True},
]


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_windows_sample_the_codes_of_single_steps(changes: dict[str, object]) -> None:
    model, uniforms = loud(**changes), candidate_uniforms(3, range(3), N)
    for sampling in (Sampling(), Sampling(guidance=2.0, temperature=0.7, top_k=5)):
        for known in (None, TOP, SOME):
            options = {"sampling": sampling, "known_codes": known}
            alone = generate(model, TEXT, uniforms, **options, window=1)
            for window in (2, W):
                assert torch.equal(generate(model, TEXT, uniforms, **options, window=window), alone)


def passes(monkeypatch: pytest.MonkeyPatch, model: Transformer, **options: object) -> int:
    """Count the passes in which windows sample one image."""
    count, real = 0, decoding.decode_window

    def counted(state: decoding.DecodeState) -> None:
        nonlocal count
        count += 1
        real(state)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode_window", counted)
        generate(model, TEXT[:1], candidate_uniforms(0, [0], N), **options)
    return count


def test_right_guesses_take_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud()
    assert passes(monkeypatch, model, window=1) == 0  # single steps
    assert 0 < passes(monkeypatch, model, window=W) < N - 1
    with torch.no_grad():  # every code is likely the same: the guess is right
        model.image_head.weight.zero_()
        model.image_head.bias.zero_()[4] = 50.0
    assert passes(monkeypatch, model, window=W) == -(-(N - 1) // W)
    codes = generate(model, TEXT[:1], candidate_uniforms(0, [0], N), window=W).flatten()
    known = codes.clone()
    known[[9, 20]] = UNKNOWN
    assert passes(monkeypatch, model, window=W, known_codes=known) == 3


def test_samples_of_windows_follow_the_model() -> None:
    # The first two codes of 3,000 candidates: as frequent as predicted, within four deviations.
    model, count = loud(), 3_000
    known = torch.zeros(N, dtype=torch.long)
    known[:2] = UNKNOWN
    uniforms = torch.rand(count, N, generator=torch.Generator().manual_seed(0))
    sampled = generate(model, TEXT[:1], uniforms, known_codes=known, window=2)
    first, second = sampled[0].flatten(1)[:, :2].T
    codes = torch.zeros(V, N, dtype=torch.long)
    codes[:, 0] = torch.arange(V)
    with torch.no_grad():
        p = model(TEXT[:1].expand(V, L), codes)[1].softmax(-1)
    expected = count * (p[0, 0][:, None] * p[:, 1])
    found = (first * V + second).bincount(minlength=V**2).view(V, V)
    assert ((found - expected).abs() <= 4 * expected.sqrt() + 2).all()


@pytest.mark.parametrize("known", [None, SOME], ids=["free", "some"])
def test_rows_of_windows_are_reported_without_guesses(known: Tensor | None) -> None:
    reports: list[list[tuple[Tensor, int]]] = []
    for window in (1, W):
        seen: list[tuple[Tensor, int]] = []
        generate(
            loud(),
            TEXT,
            candidate_uniforms(0, range(3), N),
            known_codes=known,
            on_row=lambda codes, rows, seen=seen: seen.append((codes.clone(), rows)),
            window=window,
        )
        reports.append(seen)
    assert [rows for _, rows in reports[0]] == [1, 2, 3, 4, 5]
    for (codes, rows), (other, other_rows) in zip(*reports, strict=True):
        assert rows == other_rows
        assert torch.equal(codes[..., : rows * W], other[..., : rows * W])
        rest = UNKNOWN if known is None else known[rows * W :]
        assert (other[..., rows * W :] == rest).all()


def test_windows_are_for_few_sequences() -> None:
    model = loud()
    assert pick_window(model, 1) == W  # no wider than a row
    assert pick_window(model, 8) == 4
    assert pick_window(model, 9) == 1
    assert pick_window(model.to("meta"), 1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_fused_model_is_the_model(dtype: torch.dtype) -> None:
    model = loud(positions="rotary", qk_norm=True, mlp="swiglu", sandwich=True).to(dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    codes = torch.arange(N)[None] % V
    x = model.embed(TEXT[:1], codes)
    expected = model.run(x.clone())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    found = fused(model).run(x.clone())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


PINNED: list[tuple[dict[str, object], str]] = [
    ({}, "4 3 7 1 6 5 8 8 1 4 4 6 1 4 3 10 4 4 1 1 1 1 3 1 1"),
    (
        {"positions": "rotary", "mlp": "swiglu", "qk_norm": True},
        "6 6 10 0 7 6 10 7 1 4 5 7 1 6 6 10 5 6 1 1 1 1 4 2 1",
    ),
]


@pytest.mark.parametrize(("changes", "codes"), PINNED, ids=["learned", "rotary"])
def test_a_seed_samples_the_codes_that_it_always_did(
    changes: dict[str, object], codes: str
) -> None:
    model, sampling = loud(**changes).float(), Sampling(guidance=1.5, temperature=0.9)
    for window in (1, W):
        found = generate(
            model, TEXT[:1], candidate_uniforms(3, range(2), N), sampling, window=window
        )
        assert found[0, 0].flatten().tolist() == [int(code) for code in codes.split()]
