"""Files and state dicts of earlier versions load under the present names."""

import pytest
import torch
from safetensors import safe_open

from dalle1.model.state_keys import upgrade_key
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.pipeline import BUNDLED

OLD_LAYER = {
    "attention_norm.weight": "attention.norm.weight",
    "attention.qkv.bias": "attention.branch.qkv.bias",
    "attention.out.weight": "attention.branch.out.weight",
    "attention.query_norm.weight": "attention.branch.query_norm.weight",
    "attention.key_norm.weight": "attention.branch.key_norm.weight",
    "mlp_norm.bias": "mlp.norm.bias",
    "mlp.up.weight": "mlp.branch.up.weight",
    "mlp.down.weight": "mlp.branch.down.weight",
}


@pytest.mark.parametrize("prefix", ["", "weights/", "average/", "module.model."])
def test_old_names_are_upgraded_behind_any_prefix_and_present_ones_stay(prefix: str) -> None:
    for old, new in OLD_LAYER.items():
        assert upgrade_key(f"{prefix}layers.13.{old}") == f"{prefix}layers.13.{new}"
        assert upgrade_key(f"{prefix}layers.13.{new}") == f"{prefix}layers.13.{new}"
    for foreign in ("text_head.weight", "vision_model.encoder.layers.0.mlp.fc1.weight"):
        assert upgrade_key(prefix + foreign) == prefix + foreign


def test_old_state_dicts_load() -> None:
    config = TransformerConfig(
        text_vocab=8, text_len=3, grid_size=2, codebook_size=5, width=16, depth=2, heads=2,
        norm="rms", qk_norm=True,
    )  # fmt: skip
    model, other = Transformer(config), Transformer(config)
    old = {}
    for name, tensor in model.state_dict().items():
        for new, before in ((".norm.", "_norm."), (".branch.", ".")):
            name = name.replace(new, before) if name.startswith("layers.") else name
        old[name] = tensor
    assert {"layers.1.mlp_norm.weight", "layers.1.attention.key_norm.weight"} <= old.keys()
    other.load_state_dict(old)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_the_bundled_file_has_old_names_and_loads() -> None:
    with safe_open(Transformer.file_in(BUNDLED), "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "layers.0.attention_norm.weight" in stored
    state = Transformer.load(BUNDLED).state_dict()
    assert {upgrade_key(name) for name in stored} == state.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[upgrade_key(name)], tensor.float())
