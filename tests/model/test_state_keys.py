"""Files and state dicts of earlier versions load under the present names."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dalle1.model.state_keys import upgrade_key
from dalle1.model.transformer import Transformer, TransformerConfig

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


def tiny() -> Transformer:
    return Transformer(
        TransformerConfig(
            text_vocab=8, text_len=3, grid_size=2, codebook_size=5, width=16, depth=2, heads=2,
            norm="rms", qk_norm=True,
        )
    )  # fmt: skip


def old_state(model: Transformer) -> dict[str, torch.Tensor]:
    """Return the parameters by their names in earlier versions."""
    old = {}
    for name, tensor in model.state_dict().items():
        for new, before in ((".norm.", "_norm."), (".branch.", ".")):
            name = name.replace(new, before) if name.startswith("layers.") else name
        old[name] = tensor
    assert {"layers.1.mlp_norm.weight", "layers.1.attention.key_norm.weight"} <= old.keys()
    return old


def test_old_state_dicts_load() -> None:
    model, other = tiny(), tiny()
    other.load_state_dict(old_state(model))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_old_files_load(tmp_path: Path) -> None:
    model = tiny()
    path = model.save(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(old_state(model), path, metadata)
    loaded = Transformer.load(tmp_path).state_dict()
    assert all(map(torch.equal, model.state_dict().values(), loaded.values()))
