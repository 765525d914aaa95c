"""LoRA and frozen parameters: what is trained, what it computes, and mistakes."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle1.model.lora import LoRALinear, MergedState, plain_name
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling.packed_linear import packed
from dalle1.tasks.transformer_config import TransformerTrainConfig
from dalle1.training.fine_tuning import freeze

SIZE = TransformerConfig(
    text_vocab=50, text_len=6, codebook_size=32, grid_size=4, width=32, depth=2, heads=2
)
LINEAR = ("attention.branch.qkv", "attention.branch.out", "mlp.branch.up", "mlp.branch.down")


def model_with(lora: int | None = None, *patterns: str, alpha: float | None = None) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(SIZE)
    freeze(model, lora, alpha, patterns)
    return model


def trained(model: Transformer) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def test_lora_starts_as_the_model_and_is_merged() -> None:
    plain, model = Transformer(SIZE), model_with(4, alpha=8)
    text, codes = torch.randint(50, (2, 6)), torch.randint(32, (2, 16))
    names = {plain_name(name) for name, _ in model.named_parameters()} - {None}
    assert names == {name for name, _ in plain.named_parameters()}
    state = {name: t for name, t in model.state_dict().items() if plain_name(name) is not None}
    plain.load_state_dict({str(plain_name(name)): tensor for name, tensor in state.items()})
    torch.nn.init.normal_(plain.image_head.weight)  # it starts at 0
    model.image_head.weight.copy_(plain.image_head.weight)
    assert all(torch.equal(a, b) for a, b in zip(plain(text, codes), model(text, codes)))

    for name, p in model.named_parameters():
        if "lora_up" in name:
            torch.nn.init.normal_(p)
    one = Transformer(SIZE)
    one.load_state_dict(MergedState(model))
    unchanged = MergedState(plain)
    assert all(torch.equal(unchanged[k], t) for k, t in plain.state_dict().items())
    for i, name in ((0, LINEAR[0]), (1, LINEAR[3])):
        layer, found = model.layers[i].get_submodule(name), one.layers[i].get_submodule(name)
        update = layer.lora_up.weight @ layer.lora_down.weight
        torch.testing.assert_close(found.weight, layer.base.weight + 8 / 4 * update)
        assert torch.equal(found.bias, layer.base.bias)
    expected = model(text, codes)[1]
    assert (expected - plain(text, codes)[1]).abs().max() > 0.1
    torch.testing.assert_close(one(text, codes)[1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed(model, 2)(text, codes)[1], expected, rtol=1e-4, atol=1e-4)


def test_saving_merges_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(4)
    for name, p in model.named_parameters():
        if "lora_up" in name:
            torch.nn.init.normal_(p)
    made: list[weakref.ref[torch.Tensor]] = []
    most, merge = 0, LoRALinear.merged_weight

    def tracked(self: LoRALinear) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made))
        made.append(weakref.ref(weight := merge(self)))
        return weight

    monkeypatch.setattr(LoRALinear, "merged_weight", tracked)
    model.save(tmp_path)
    assert len(made) >= 8
    assert most <= 2
    state = MergedState(model)
    assert all(torch.equal(t, state[k]) for k, t in Transformer.load(tmp_path).state_dict().items())


def test_what_is_trained() -> None:
    everything = trained(model_with())
    added = {
        f"layers.{i}.{m}.lora_{k}.weight" for i in (0, 1) for m in LINEAR for k in ("down", "up")
    }
    assert trained(model_with(2)) == added
    assert trained(model_with(2, "image_head")) == added | {"image_head.weight", "image_head.bias"}
    assert trained(model_with(None, "*.bias")) == {x for x in everything if x.endswith(".bias")}
    first = {name for name in everything if name.startswith("layers.0.mlp.")}
    assert len(first) == 6
    assert trained(model_with(None, "layers.0.mlp")) == first
    assert trained(model_with(None, "*")) == everything
    both = trained(model_with(2, "layers.*.qkv.weight"))
    assert both - added == {f"layers.{i}.attention.branch.qkv.base.weight" for i in (0, 1)}


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("imge_head", "use one such as image_head"),
        ("layers.7.mlp", r"use one such as layers\.[01]\.mlp"),
        ("§", r"use one such as image_head, layers\.\*\.mlp"),
        ("", r"use one such as"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"train_only is '{pattern}', expected .*; {near}"):
        model_with(None, "norm", pattern)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": 0}, "lora is 0, expected a rank of at least 1"),
        ({"lora": -3}, "lora is -3, expected a rank of at least 1"),
        ({"lora": 4, "init": None}, "--init names none; use --init FOLDER, or remove --lora"),
        ({"lora_alpha": 4.0}, "lora_alpha scales the updates of --lora"),
        ({"lora": 4, "lora_alpha": 0.0}, "lora_alpha is 0.0, expected a number above 0"),
        ({"lora": 4, "lora_alpha": float("nan")}, "lora_alpha is nan, expected a number above 0"),
        ({"lora": 4, "zero": 2}, "--zero 1, 2, 3 and --deepspeed do not support"),
        ({"train_only": ("norm",), "zero": 1}, "--zero 1, 2, 3 and --deepspeed do not support"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerTrainConfig(out=Path("x"), **{"init": Path("y"), **settings})


def test_a_rank_above_that_of_the_layers() -> None:
    with pytest.raises(ValueError, match="lora is 33, expected a rank of at most 32"):
        model_with(33)
