"""The transformer against the specification: dependencies, the loss, a dense reference."""

from __future__ import annotations

import math
from pathlib import Path

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
from torch import nn

from dalle1.model.masks import MaskKind
from dalle1.model.transformer import Transformer, TransformerConfig

KINDS: list[MaskKind] = ["full", "row", "column", "conv"]


@pytest.mark.parametrize("kind", [*KINDS, "paper"])
def test_logits_are_those_of_a_dense_implementation(kind: str) -> None:
    model = loud() if kind == "paper" else one_layer(kind)  # type: ignore[arg-type]
    text, codes = example()
    got_text, got_image = model(text, codes)
    expected = reference(model, text, codes)
    torch.testing.assert_close(got_text, expected[:, :L, : TEXT + L], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_image, expected[:, L:, TEXT + L :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_depends_on_exactly_what_its_mask_shows(kind: MaskKind) -> None:
    model = one_layer(kind)
    for token in range(L):  # token t is read by state t + 1, the last by none
        readers = range(token + 1, L + N) if token < L - 1 else ()
        assert changed(model, token=token) == list(readers)
    for position in range(N):  # so is code z; the states behind see it if the mask shows its reader
        reader = L + position + 1
        expected = [i for i in range(reader, L + N) if allowed(kind, i, reader)]
        assert changed(model, position=position) == expected


@torch.no_grad()
def test_the_whole_model_never_sees_ahead() -> None:
    model = loud()
    for token in range(L):
        states = changed(model, token=token)
        assert states == (list(range(token + 1, L + N)) if token < L - 1 else [])
    for position in range(N):
        states = changed(model, position=position)
        assert all(i > L + position for i in states)
        assert (L + position + 1 in states) == (position < N - 1)


@torch.no_grad()
def test_the_boundary_between_text_and_image() -> None:
    model = loud()
    text, codes = example(1)
    text_logits, image_logits = model(text, codes)
    assert text_logits.shape == (1, L, TEXT + L)
    assert image_logits.shape == (1, N, V)

    def after(table: nn.Embedding, row: int) -> list[bool]:
        kept = table.weight[row].clone()
        table.weight[row] += torch.linspace(0, 1, 16)  # not a constant, which norms remove
        new = model(text, codes)
        table.weight[row] = kept
        return [not torch.equal(a, b) for a, b in zip(new, (text_logits, image_logits))]

    # The first image state reads the image's own start token; no text state does.
    assert after(model.image_embedding, V) == [False, True]
    first = model(text, codes)[1][:, 0]
    model.image_embedding.weight[V] += torch.linspace(0, 1, 16)
    assert not torch.allclose(model(text, codes)[1][:, 0], first)
    # The last caption token is predicted and never read.
    text = torch.arange(L)[None]
    text_logits, image_logits = model(text, codes)
    assert after(model.text_embedding, L - 1) == [False, False]
    assert after(model.text_embedding, L - 2) == [True, True]


@torch.no_grad()
def test_every_code_is_read_where_it_is_predicted() -> None:
    # The state that predicts position p carries the row and column of p, not those of p − 1.
    model = loud()
    inputs = torch.zeros(1, N, dtype=torch.long)
    found = model.embed_codes(inputs) - model.image_embedding.weight[0]
    for position in (0, 3, 4, 9, 15):
        expected = model.row.weight[position // 4] + model.column.weight[position % 4]
        torch.testing.assert_close(found[0, position], expected)
    torch.testing.assert_close(
        model.embed_codes(inputs[:, :3], torch.arange(6, 9)),
        model.embed_codes(inputs)[:, 6:9],
    )


def test_the_number_of_parameters_and_their_initial_spread() -> None:
    torch.manual_seed(0)
    d, depth = 64, 3
    config = TransformerConfig(
        text_vocab=300, text_len=8, codebook_size=200, grid_size=32, width=d, depth=depth, heads=4
    )
    model = Transformer(config)
    tables = (300 + 8 + 1) + (200 + 1) + 8 + 32 + 32
    layer = 12 * d**2 + 13 * d
    heads = (300 + 8 + 200) * (d + 1)
    expected = tables * d + depth * layer + 2 * d + heads
    assert sum(p.numel() for p in model.parameters()) == expected

    weights, deep = 0.125 / math.sqrt(d), math.sqrt(2 * depth)
    spread = {
        "text_embedding": weights,
        "image_embedding": weights,
        "text_position": weights / math.sqrt(2),
        "row": weights / math.sqrt(3),
        "column": weights / math.sqrt(3),
        "layers.0.attention.branch.qkv": weights,
        "layers.0.attention.branch.out": weights / deep,
        "layers.2.mlp.branch.up": weights,
        "layers.2.mlp.branch.down": 0.125 / math.sqrt(4 * d) / deep,
    }
    for name, std in spread.items():
        found = model.get_submodule(name).weight.std().item()  # type: ignore[union-attr, operator]
        assert found == pytest.approx(std, rel=0.1), name
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    text = torch.zeros(1, 8, dtype=torch.long)
    for logits in model(text, torch.zeros(1, 32, 32, dtype=torch.long)):
        assert (logits == 0).all()


def test_loss_by_hand_and_its_sign() -> None:
    text, codes = example()
    loss = Transformer(SIZE).loss(text, codes)  # no opinion yet: the logarithm of the choices
    assert loss.text.item() == pytest.approx(math.log(TEXT + L))
    assert loss.image.item() == pytest.approx(math.log(V))
    assert loss.total.item() == pytest.approx(math.log(TEXT + L) / 8 + 7 * math.log(V) / 8)

    model = loud()
    text_log, image_log = (x.log_softmax(-1) for x in model(text, codes))
    by_hand = [
        -sum(text_log[b, i, text[b, i]] for b in range(2) for i in range(L)) / (2 * L),
        -sum(image_log[b, i, codes.flatten(1)[b, i]] for b in range(2) for i in range(N)) / (2 * N),
    ]
    loss = model.loss(text, codes)
    torch.testing.assert_close(torch.stack([loss.text, loss.image]), torch.stack(by_hand))
    torch.testing.assert_close(loss.total, by_hand[0] / 8 + 7 * by_hand[1] / 8)
    assert loss.text > 0
    assert loss.image > 0
    torch.testing.assert_close(model.loss(text, codes, 1.0).total, by_hand[0])
    with torch.no_grad():  # sure of the right code everywhere: cheaper
        model.image_head.weight.zero_()
        model.image_head.bias.copy_(F.one_hot(torch.tensor(3), V) * 20.0)
    assert model.loss(text, torch.full_like(codes, 3)).image < 1e-6
    assert model.loss(text, torch.full_like(codes, 4)).image > 19


def test_loss_does_not_change_when_the_batch_is_repeated() -> None:
    model, (text, codes) = loud(), example()
    once, thrice = model.loss(text, codes), model.loss(text.repeat(3, 1), codes.repeat(3, 1, 1))
    for name in ("total", "text", "image"):
        torch.testing.assert_close(getattr(once, name), getattr(thrice, name))


def test_one_batch_is_overfitted() -> None:
    torch.manual_seed(0)
    model, (text, codes) = Transformer(SIZE), example()
    text[:, 0] = torch.tensor([1, 2])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model.loss(text, codes)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.image < 0.01
    # Which of two captions it is cannot be known before its first token, nor cheaper than this.
    floor = math.log(2) / L
    assert floor - 1e-3 < loss.text < floor + 0.1


def test_saved_models_come_back_the_same(tmp_path: Path) -> None:
    model, (text, codes) = loud(), example()
    assert model.save(tmp_path).name == "transformer.safetensors"
    loaded = Transformer.load(tmp_path)
    assert loaded.config == SIZE
    assert not loaded.training
    for a, b in zip(loaded(text, codes), model(text, codes), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "transformer.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="damaged"):
        Transformer.load(tmp_path)
    with pytest.raises(ValueError, match=r"no Transformer in .*nowhere: the folder does not exist"):
        Transformer.load(tmp_path / "nowhere")


def test_wrong_shapes_are_named() -> None:
    model, (text, codes) = Transformer(SIZE), example()
    for bad in (
        (text[:, :-1], codes),
        (text, codes[:, :-1]),
        (text, codes.flatten(1)[:, :-1]),
        (text[:1], codes),
        (text[0], codes),
        (text[:0], codes[:0]),
    ):
        with pytest.raises(ValueError, match=r"got text .* expected \[B, 5\] and \[B, 4, 4\]"):
            model(*bad)
    flat = model(text, codes.flatten(1))[1]
    assert torch.equal(flat, model(text, codes)[1])
