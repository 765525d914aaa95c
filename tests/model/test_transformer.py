"""The transformer against the specification: dependencies, the loss, a dense reference."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.model.attention import MaskedAttention
from dalle1.model.masks import MaskKind
from dalle1.model.transformer import Residual, Transformer, TransformerConfig
from dalle1.sampling.decoding import generate
from dalle1.sampling.filters import Sampling
from dalle1.sampling.fused_step import StepResidual
from dalle1.tasks.transformer import TRANSFORMER_PRESETS

KINDS: list[MaskKind] = ["full", "row", "column", "conv"]
L, W, V, TEXT = 5, 4, 11, 13
N = W**2
SIZE = TransformerConfig(
    text_vocab=TEXT, text_len=L, codebook_size=V, grid_size=W, width=16, depth=3, heads=2
)


def loud(config: TransformerConfig = SIZE) -> Transformer:
    """Return a model whose every weight matters, unlike one that is just initialised."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def one_layer(kind: MaskKind) -> Transformer:
    model = loud(TransformerConfig(**{**vars(SIZE), "depth": 1}))
    model.kinds, model.masks = [kind], nn.ModuleDict({kind: MaskedAttention(kind, L, W)})
    return model


def example(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(TEXT + L, (batch, L), generator=generator)
    return text, torch.randint(V, (batch, W, W), generator=generator)


def allowed(kind: str, i: int, j: int) -> bool:
    """Whether state i sees state j, straight from the paper's figure 11."""
    if j > i or i < L or j < L:
        return j <= i
    behind = i - j
    if kind == "row":
        return behind <= W
    if kind == "column":
        return behind % W == 0
    return kind == "full" or any(behind == W * a + c for a in range(6) for c in range(-5, 6))


def reference(model: Transformer, text: Tensor, codes: Tensor) -> Tensor:
    """Return the logits of all states over text and image vocabulary, densely and by loops."""
    w = model.state_dict()
    d, heads = model.config.width, model.config.heads
    result = []
    for caption, image in zip(text.tolist(), codes.flatten(1).tolist(), strict=True):
        states = []
        for position, token in enumerate([TEXT + L, *caption[:-1]]):
            states.append(w["text_embedding.weight"][token] + w["text_position.weight"][position])
        for position, code in enumerate([V, *image[:-1]]):
            where = w["row.weight"][position // W] + w["column.weight"][position % W]
            states.append(w["image_embedding.weight"][code] + where)
        x = torch.stack(states)
        for number, kind in enumerate(model.kinds):
            prefix = f"layers.{number}."
            p = {k.removeprefix(prefix): w[k] for k in w if k.startswith(prefix)}
            p = {k.replace(".branch.", "."): tensor for k, tensor in p.items()}
            y = F.layer_norm(x, (d,), p["attention.norm.weight"], p["attention.norm.bias"])
            q, k, v = (y @ p["attention.qkv.weight"].T + p["attention.qkv.bias"]).chunk(3, -1)
            mixed = torch.zeros_like(x)
            for h in range(heads):
                part = slice(h * d // heads, (h + 1) * d // heads)
                for i in range(len(x)):
                    seen = [j for j in range(len(x)) if allowed(kind, i, j)]
                    scores = k[seen, part] @ q[i, part] / math.sqrt(d // heads)
                    mixed[i, part] = scores.softmax(0) @ v[seen, part]
            x = x + mixed @ p["attention.out.weight"].T + p["attention.out.bias"]
            y = F.layer_norm(x, (d,), p["mlp.norm.weight"], p["mlp.norm.bias"])
            y = y @ p["mlp.up.weight"].T + p["mlp.up.bias"]
            x = x + (y * (1.702 * y).sigmoid()) @ p["mlp.down.weight"].T + p["mlp.down.bias"]
        x = F.layer_norm(x, (d,), w["norm.weight"], w["norm.bias"])
        heads_weight = torch.cat([w["text_head.weight"], w["image_head.weight"]])
        result.append(x @ heads_weight.T + torch.cat([w["text_head.bias"], w["image_head.bias"]]))
    return torch.stack(result)


def test_a_sandwich_survives_an_overflow_in_fp16() -> None:
    branch, norms = torch.nn.Linear(4, 4).half(), [torch.nn.LayerNorm(4).half() for _ in "ab"]
    torch.nn.init.constant_(branch.weight, 1e4)
    torch.nn.init.constant_(branch.bias, 6e4)
    x = torch.tensor([[1.0, 2, 3, -7]]).half()
    assert branch(norms[0](x) + 1).isinf().any()
    residual = Residual(norms[0], lambda y: branch(y + 1), norms[1])  # type: ignore[arg-type]
    assert residual(x).isfinite().all()
    assert torch.equal(StepResidual(residual)(x.clone()), residual(x))


@pytest.mark.parametrize("kind", [*KINDS, "paper"])
def test_logits_are_those_of_a_dense_implementation(kind: str) -> None:
    model = loud() if kind == "paper" else one_layer(kind)  # type: ignore[arg-type]
    text, codes = example()
    got_text, got_image = model(text, codes)
    expected = reference(model, text, codes)
    torch.testing.assert_close(got_text, expected[:, :L, : TEXT + L], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_image, expected[:, L:, TEXT + L :], rtol=1e-4, atol=1e-4)


def scores(model: Transformer, text: Tensor, codes: Tensor) -> Tensor:
    """Return the logits of all states as one tensor, the shorter ones filled up with zeros."""
    return torch.cat([F.pad(x, (0, TEXT + L + V - x.shape[2])) for x in model(text, codes)], 1)


def changed(model: Transformer, token: int | None = None, position: int | None = None) -> list[int]:
    """List the states whose logits change with one text token or with one code."""
    text, codes = example(1)
    before = scores(model, text, codes)
    if token is not None:
        text[0, token] = (text[0, token] + 1) % (TEXT + L)
    if position is not None:
        codes.view(-1)[position] = (codes.view(-1)[position] + 1) % V
    moved = (scores(model, text, codes) - before).abs().amax(-1)[0]
    return (moved > 1e-5).nonzero()[:, 0].tolist()


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
