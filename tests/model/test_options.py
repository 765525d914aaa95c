"""The transformer's options, those of the paper and later ones, its presets and its FLOPs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_transformer import (
    SIZE,
    TEXT,
    L,
    N,
    V,
    allowed,
    changed,
    example,
    loud,
    one_layer,
    reference,
)
from torch import Tensor

from dalle1.model.transformer import Residual, Transformer, TransformerConfig
from dalle1.sampling.decoding import generate
from dalle1.sampling.filters import Sampling
from dalle1.sampling.fused_step import StepResidual
from dalle1.tasks.transformer import TRANSFORMER_PRESETS


def test_a_sandwich_survives_an_overflow_in_fp16() -> None:
    branch, norms = torch.nn.Linear(4, 4).half(), [torch.nn.LayerNorm(4).half() for _ in "ab"]
    torch.nn.init.constant_(branch.weight, 1e4)
    torch.nn.init.constant_(branch.bias, 6e4)
    x = torch.tensor([[1.0, 2, 3, -7]]).half()
    assert branch(norms[0](x) + 1).isinf().any()
    residual = Residual(norms[0], lambda y: branch(y + 1), norms[1])  # type: ignore[arg-type]
    assert residual(x).isfinite().all()
    assert torch.equal(StepResidual(residual)(x.clone()), residual(x))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text_vocab", 0, "text_vocab is 0"),
        ("text_len", 1, "text_len is 1, expected at least 2"),
        ("codebook_size", 0, "codebook_size is 0"),
        ("grid_size", 0, "grid_size is 0"),
        ("depth", 0, "depth is 0"),
        ("heads", 0, "heads is 0"),
        ("heads", 7, "width is 3968, expected a multiple of heads, 7"),
    ],
)
def test_impossible_sizes_are_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{field: value})


BILLIONS = {"small": 0.051, "base": 0.25, "1b": 1.3, "2.8b": 2.8, "5.6b": 5.6, "12b": 12.1}


@pytest.mark.parametrize("name", TRANSFORMER_PRESETS)
def test_every_preset_builds(name: str) -> None:
    size = TRANSFORMER_PRESETS[name].model
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**vars(size)))
    count = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    # SwiGLU is 8/3 times as wide, brought to whole multiples of 8.
    assert matrices == pytest.approx(12 * size.width**2 * size.depth, rel=0.01)
    if name in ("2.8b", "5.6b", "12b"):  # the paper counts its resblocks
        count = matrices
    if name in BILLIONS:
        assert count / 1e9 == pytest.approx(BILLIONS[name], rel=0.05)
        assert size.width // size.heads == 64


def test_the_paper_s_preset_is_the_paper_s() -> None:
    config = TransformerConfig(**vars(TRANSFORMER_PRESETS["12b"].model))
    assert config == TransformerConfig()
    assert (config.length, config.head_size) == (1280, 64)
    recipe = TRANSFORMER_PRESETS["12b"]
    assert (recipe.beta2, recipe.weight_decay, recipe.variance_clip) == (0.96, 4.5e-2, 5.0)
    assert (recipe.ema_decay, recipe.ema_every, recipe.clip_norm) == (0.99, 25, 4.0)


# What the paper leaves open, and what came later


@pytest.mark.parametrize(
    "changes",
    [
        {"image_start": "text"},
        {"pad_targets": False},
        {"shared_softmax": True},
        {"conv_wrap": False},
        {"attention": "full"},
        {"positions": "rotary"},
        {"norm": "rms"},
        {"mlp": "swiglu"},
        {"qk_norm": True},
        {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "qk_norm": True},
        {"image_start": "none"},
        {"image_start": "none", "positions": "rotary"},
        {"positions": "flat", "mlp": "gelu-erf"},
        {"sandwich": True, "head_norm": True, "mlp": "gelu-tanh"},
        {"head_width": 12, "mlp": "geglu"},
        {"masks": ("line", "conv-7", "full")},
    ],
    ids=str,
)
def test_every_option_learns_is_causal_and_decodes_stepwise(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SIZE, **changes))
    text, codes = example()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model.loss(text, codes)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.total.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        model.eval()
        first = L - (changes.get("image_start") == "none")  # state that predicts the first code
        for position in (0, N // 2, N - 1):
            moved = changed(model, position=position)
            assert all(state > first + position for state in moved)
            assert position == N - 1 or first + position + 1 in moved
        last_word = changed(model, token=L - 1)  # read by the first image state, or by none
        assert (first in last_word) == (changes.get("image_start") in ("text", "none"))
        sampled = generate(model, text, torch.zeros(1, N), Sampling(temperature=0))[:, 0]
        assert torch.equal(sampled.flatten(1), likeliest(model, text))


def likeliest(model: Transformer, text: Tensor) -> Tensor:
    """Sample the likeliest codes, computing the whole stream for each."""
    codes = torch.zeros(len(text), N, dtype=torch.long)
    for position in range(N):
        codes[:, position] = model(text, codes)[1][:, position].argmax(-1)
    return codes


def test_pads_that_are_no_targets_do_not_count() -> None:
    model, (text, codes) = loud(), example()
    text[:, :2] %= TEXT
    text[:, 2:] = TEXT + torch.arange(2, L)
    only = Transformer(dataclasses.replace(SIZE, pad_targets=False))
    only.load_state_dict(model.state_dict())
    logits = model(text, codes)[0]
    by_hand = F.cross_entropy(logits[:, :2].flatten(0, 1), text[:, :2].flatten())
    assert only.loss(text, codes).text.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert only.loss(text, codes).image.item() == pytest.approx(
        model.loss(text, codes).image.item()
    )


def test_a_shared_softmax_is_over_both_vocabularies() -> None:
    model, (text, codes) = loud(), example()
    shared = Transformer(dataclasses.replace(SIZE, shared_softmax=True))
    shared.load_state_dict(model.state_dict())
    joint = reference(model, text, codes)
    loss = shared.loss(text, codes)
    of_text = F.cross_entropy(joint[:, :L].flatten(0, 1), text.flatten())
    of_image = F.cross_entropy(joint[:, L:].flatten(0, 1), TEXT + L + codes.flatten())
    assert loss.text.item() == pytest.approx(of_text.item(), rel=1e-4)
    assert loss.image.item() == pytest.approx(of_image.item(), rel=1e-4)


@pytest.mark.parametrize("wrong", [{"norm": "batch"}, {"mlp": "relu"}, {"attention": "dense"}])
def test_an_unknown_option_is_refused(wrong: dict[str, Any]) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} is '{value}', expected"):
        TransformerConfig(**wrong)


def test_flops_by_hand() -> None:
    model = one_layer("row")
    d, t = model.config.width, L + N
    pairs = sum(allowed("row", i, j) for i in range(t) for j in range(t))
    products = t * 12 * d * d + L * d * (TEXT + L) + N * d * V
    assert model.flops() == 2 * (products + 2 * d * pairs)
