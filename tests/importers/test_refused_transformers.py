"""Foreign transformers: other models, and hostile or damaged files, are refused with a reason."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import CODES, dalle_pytorch_file, rudalle_files, rudolph_files
from tokenizers.implementations import CharBPETokenizer

from dalle1.importers import dalle_pytorch, mindalle, rudalle, rudolph, vqgan
from dalle1.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reversible": True}, r"has reversible layers \(reversible\)"),
        ({"rotary_emb": True, "dim_head": 12}, r"has rotary positions \(rotary_emb\)"),
        ({"shift_tokens": True}, r"has shifted tokens \(shift_tokens\)"),
        ({"attn_types": ("full", "conv_like")}, "has attention of type 'conv_like'"),
    ],
)
def test_other_models_of_dalle_pytorch_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path, _ = dalle_pytorch_file(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"{message}.*not supported"):
        dalle_pytorch.read_checkpoint(path)


def test_version_2_of_rudalle_is_refused(tmp_path: Path) -> None:
    files, _, _ = rudalle_files(tmp_path, "v2")
    with pytest.raises(ValueError, match=r"version 2 \(Malevich_v2, Emojich\)"):
        rudalle.load_transformer(files[0], heads=2, codes=64)


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, _, _ = rudalle_files(tmp_path)
    state = torch.load(files[0], weights_only=True)
    with pytest.raises(ValueError, match="is 16 wide, expected one of 1024, 2048"):
        rudalle.load_transformer(files[0], codes=64)
    with pytest.raises(ValueError, match="has 0 tensors called tok_emb_txt"):
        mindalle.load_transformer(files[0], 0)
    torch.save({**state, "more": torch.zeros(1)}, files[0])
    with pytest.warns(UserWarning, match="1 tensors of .* are not part of the model: more"):
        rudalle.load_transformer(files[0], heads=2, codes=64)
    del state["transformer.layers.1.mlp.dense_h_to_4h.bias"]
    torch.save(state, files[0])
    with pytest.raises(ValueError, match=r"has no tensor transformer\.layers\.1\.mlp\.dense_h_to"):
        rudalle.load_transformer(files[0], heads=2, codes=64)
    with pytest.raises(SystemExit):
        mindalle.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "has no file stage2_last.ckpt; expected the published folder" in capsys.readouterr().err


class Hostile:
    """Pickled, it is a call of os.mkdir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("module", [dalle_pytorch, mindalle, rudalle, rudolph, vqgan])
def test_hostile_files_are_refused_and_not_run(
    tmp_path: Path, module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"state_dict": {"a": torch.zeros(1)}, "hparams": {"x": Hostile(tmp_path / "run")}}
    names = ("stage1_last.ckpt", "stage2_last.ckpt", "model.bin")
    for name in names:
        torch.save(content, tmp_path / name)
    trained = CharBPETokenizer()
    trained.train_from_iterator(["a cat"], 20, 1, special_tokens=["[PAD]", "[UNK]"])
    (tmp_path / "tokenizer").mkdir()
    trained.save_model(str(tmp_path / "tokenizer"), "bpe-16k")
    file, out = str(tmp_path / "model.bin"), ["--out", str(tmp_path / "out")]
    count = {mindalle: 0, vqgan: 1, dalle_pytorch: 2}.get(module, 3)
    with pytest.raises(SystemExit) as stopped:
        module.main([*([file] * count or [str(tmp_path)]), *out])
    assert stopped.value.code == 2
    assert re.search(r"nothing in it was run: it names (posix|nt)\.mkdir", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": "4"}, "has the hyperparameter depth '4', expected a number"),
        ({"depth": 9}, "has no tensor transformer.layers.layers.4.0.scale"),
        ({"dim": 32}, "does not match the expected transformer"),
        ({"attn_types": 5}, "has attention of type '5'"),
    ],
)
def test_damaged_hyperparameters_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path, _ = dalle_pytorch_file(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "hparams": {**content["hparams"], **changes}}, path)

    def load() -> Transformer:
        params, tensors, _ = dalle_pytorch.read_checkpoint(path)
        return dalle_pytorch.load_transformer(tensors, params)

    with pytest.raises(ValueError, match=re.escape(message)):
        load()


def test_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    files, _, _ = rudalle_files(tmp_path)
    state = torch.load(files[0], weights_only=True)
    state["text_embeddings.weight"] = state["text_embeddings.weight"][0]
    torch.save(state, files[0])
    with pytest.raises(ValueError, match="does not match the expected transformer"):
        rudalle.load_transformer(files[0], heads=2, codes=CODES)


def test_masks_that_are_missing_are_named(tmp_path: Path) -> None:
    files, _, _ = rudolph_files(tmp_path)
    state = torch.load(files[0], weights_only=True)
    conv, last = "transformer.conv_mask", "transformer.last_conv_mask"
    for missing, first in (((last,), last), ((conv,), conv), ((conv, last), conv)):
        torch.save({k: t for k, t in state.items() if k not in missing}, files[0])
        with pytest.raises(ValueError, match=f"has no tensor {re.escape(first)}, expected one"):
            rudalle.load_transformer(files[0], heads=2, codes=CODES)
    torch.save({**state, "transformer.conv_mask": torch.ones(5)}, files[0])
    with pytest.raises(ValueError, match=r"has a conv_mask \(5,\), expected at least 72 × 72"):
        rudalle.load_transformer(files[0], heads=2, codes=CODES)


def test_a_rudalle_without_masks_is_read_as_version_3(tmp_path: Path) -> None:
    files, _, _ = rudalle_files(tmp_path)
    state = torch.load(files[0], weights_only=True)
    expected = rudalle.load_transformer(files[0], heads=2, codes=CODES).config
    torch.save({k: t for k, t in state.items() if "mask" not in k}, files[0])
    with pytest.warns(UserWarning, match="has no conv_mask.* read as version 3"):
        found = rudalle.load_transformer(files[0], heads=2, codes=CODES)
    assert found.config == expected


@pytest.mark.parametrize("value", [None, ((0.0,) * 3, (1.0,) * 3), ((0.5,) * 3, (0.3,) * 3), 1])
def test_other_normalizations_are_refused(tmp_path: Path, value: Any) -> None:
    path, _ = dalle_pytorch_file(tmp_path)
    content = torch.load(path, weights_only=True)
    for normalization in (((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0)), value):
        content["vae_params"]["normalization"] = normalization
        torch.save(content, path)
        params, tensors, vae_params = dalle_pytorch.read_checkpoint(path)
        transformer = dalle_pytorch.load_transformer(tensors, params)
        if normalization is not value:
            dalle_pytorch.load_image_tokenizer(tensors, vae_params, transformer)
            continue
        with pytest.raises(ValueError, match=r"has a dVAE with normalization .*, expected means"):
            dalle_pytorch.load_image_tokenizer(tensors, vae_params, transformer)
