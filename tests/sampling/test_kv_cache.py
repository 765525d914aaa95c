"""Caches hold what masks still show, and steps through them match whole streams."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from dalle1.model.attention import MaskedAttention
from dalle1.model.masks import MaskKind, image_mask
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling.kv_cache import Caches, SlotLayout, decode_memory
from dalle1.tasks.transformer import TRANSFORMER_PRESETS

KINDS = get_args(MaskKind)
L, V = 5, 11


def loud(kind: MaskKind | None, grid_size: int = 7, **changes: object) -> Transformer:
    """Return a model whose scores are far from uniform, of two layers of one kind or of three."""
    config = TransformerConfig(
        text_vocab=13,
        text_len=L,
        codebook_size=V,
        grid_size=grid_size,
        width=16,
        depth=2 if kind else 3,
        heads=2,
    )
    model = Transformer(dataclasses.replace(config, **changes)).eval()
    if kind:
        wrap = model.config.conv_wrap
        model.kinds = [kind] * 2
        model.masks = nn.ModuleDict({kind: MaskedAttention(kind, L, grid_size, wrap)})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def streams(prompts: int, candidates: int, grid_size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(13, (prompts, L), generator=generator)
    return text, torch.randint(V, (prompts, candidates, grid_size**2), generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("grid_size", [1, 2, 4, 7, 13])
def test_a_layout_shows_what_the_mask_shows(kind: MaskKind, wrap: bool, grid_size: int) -> None:
    mask = image_mask(kind, grid_size, wrap)
    layout = SlotLayout(kind, grid_size, wrap, torch.empty(0))
    slots = torch.full((layout.groups * layout.size,), -1)  # which code each holds
    for position in range(grid_size**2):
        slot, group, hidden = layout.at(torch.tensor([position]))
        slots[slot] = position
        held = slots.view(layout.groups, layout.size)[group][0]
        seen = held[hidden[0] == 0]
        assert sorted(seen.tolist()) == mask[position].nonzero()[:, 0].tolist()
        assert hidden[0].isfinite().sum() == len(seen)


@pytest.mark.parametrize(
    ("kind", "slots"), [("row", 33), ("conv", 166), ("column", 1024), ("full", 1024)]
)
def test_a_layout_is_no_larger_than_it_must_be(kind: MaskKind, slots: int) -> None:
    layout = SlotLayout(kind, 32, True, torch.empty(0))
    assert layout.groups * layout.size == slots
    assert layout.size == (32 if kind == "column" else slots)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("primed", [0, 1, 6, 20, 48])
def test_steps_have_the_scores_of_the_whole_stream(kind: MaskKind | None, primed: int) -> None:
    prompts, candidates = 2, 3
    model, (text, codes) = loud(kind), streams(prompts, candidates)
    codes[:, :, : primed + 1] = codes[:1, :1, : primed + 1]  # what is read at once is shared
    whole = model(text.repeat_interleave(candidates, 0), codes.flatten(0, 1))[1]
    whole = whole.unflatten(0, (prompts, candidates))
    caches = Caches(model, prompts, candidates)
    states = model.run(model.embed(text, codes[:, 0, : primed + 1]), caches.prefill)[:, -1:]
    for position in range(primed, model.config.image_len):
        if position > primed:
            here = torch.tensor([position])
            caches.seek(here)
            x = model.embed_codes(codes[:, :, position - 1], here)
            states = model.run(x, caches.step, L + here)
        scores = model.image_head(states).expand(-1, candidates, -1)
        torch.testing.assert_close(scores, whole[:, :, position], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"conv_wrap": False},
        {"positions": "rotary"},
        {"image_start": "text"},
        {"attention": "full"},
        {"norm": "rms", "mlp": "swiglu", "qk_norm": True},
        {"image_start": "none"},
        {"image_start": "none", "positions": "flat", "sandwich": True, "head_norm": True},
        {"head_width": 12, "mlp": "geglu"},
    ],
    ids=str,
)
def test_steps_have_the_scores_of_the_whole_stream_with_every_option(
    changes: dict[str, object],
) -> None:
    model, (text, codes) = loud(None, **changes), streams(2, 3)
    whole = model(text.repeat_interleave(3, 0), codes.flatten(0, 1))[1].unflatten(0, (2, 3))
    caches = Caches(model, 2, 3)
    model.run(model.embed(text, codes[:, 0, :1]), caches.prefill)
    for position in range(1, model.config.image_len):
        here = torch.tensor([position - (model.config.image_start == "none")])
        caches.seek(here)
        states = model.run(
            model.embed_codes(codes[:, :, position - 1], here), caches.step, L + here
        )
        # The first step's code is each candidate's own, though the start state is shared.
        torch.testing.assert_close(
            model.image_head(states), whole[:, :, position], rtol=1e-4, atol=1e-5
        )


def held(model: Transformer, prompts: int, candidates: int) -> int:
    layers = Caches(model, prompts, candidates).layers
    return sum(x.nbytes for layer in layers for x in (layer.text, layer.codes, layer.scores))


def test_memory_is_what_was_estimated() -> None:
    model = loud(None, 13).to(torch.bfloat16)
    of_prompt, of_candidate = decode_memory(model)
    one_more = held(model, 1, 3) - held(model, 1, 2)
    assert one_more <= of_candidate <= one_more + 64 * V
    assert held(model, 2, 3) == 2 * held(model, 1, 3)
    assert held(model, 1, 3) <= of_prompt + 3 * of_candidate


def test_the_papers_512_candidates_take_a_quarter_of_a_dense_cache() -> None:
    with torch.device("meta"):
        config = TransformerConfig(**vars(TRANSFORMER_PRESETS["12b"].model))
        model = Transformer(config).to(torch.bfloat16)
    dense = 512 * config.depth * 2 * config.length * config.width * 2
    assert 0.2 < held(model, 1, 512) / dense < 0.25


@torch.no_grad()
def test_rotary_positions_are_exact_in_low_precision() -> None:
    model = loud(None, positions="rotary", text_len=256)
    assert model.rotary is not None
    positions = torch.arange(model.config.length)
    angles = model.rotary(positions)
    torch.testing.assert_close(model.to(torch.bfloat16).rotary(positions), angles, rtol=0, atol=0)
