"""Decoders that start from another decoder (`--init`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import COMMON, Folders, make_folders, train

from dalle2.tasks import decoder
from dalle2.unet import UNet


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("unclip"))


def decoder_from(folders: Folders, out: Path, init: Path, *flags: str) -> Path:
    """Train a decoder that starts from another one, without moving it."""
    models = ["--autoencoder", str(folders.autoencoder), "--clip", str(folders.clip)]
    data = ["--data", str(folders.embedded), "--validation-pairs", "4", *COMMON]
    still = ["--seed", "1", "--steps", "1", "--learning-rate", "0", "--final-learning-rate", "0"]
    words = ["--init", str(init), "--out", str(out), *still, *flags]
    decoder.main(["small", *models, *data, *words])
    return out


def test_a_decoder_starts_from_another_one_of_other_sizes_than_its_preset(
    folders: Folders, tmp_path: Path
) -> None:
    before = train(decoder, folders, tmp_path / "one", 2)
    found = UNet.load(decoder_from(folders, tmp_path / "two", tmp_path / "one"))
    assert found.config == UNet.config_of(tmp_path / "one")
    for name, p in found.named_parameters():
        torch.testing.assert_close(p, before[f"average/{name}"])


def test_inlets_of_other_conditions_start_anew(folders: Folders, tmp_path: Path) -> None:
    before = train(decoder, folders, tmp_path / "one", 2)

    def same(*flags: str) -> dict[str, bool]:
        out = tmp_path / str(len(flags))
        found = UNet.load(decoder_from(folders, out, tmp_path / "one", *flags))
        pairs = ((n, p, before.get(f"average/{n}")) for n, p in found.named_parameters())
        return {n: q is not None and q.shape == p.shape and p.equal(q) for n, p, q in pairs}

    with pytest.warns(UserWarning, match=r"5 of its tensors do not fit \(embedding_tokens, emb"):
        pooled = same("--embedding", "none", "--model.text-pool")
    assert {name for name, kept in pooled.items() if not kept} == {
        "caption_vector.weight",
        "caption_vector.bias",
    }
    anew = same("--new-inlets")
    changed = {name for name, kept in anew.items() if not kept}
    assert {"text_tokens.weight", "embedding_vector.weight", "null_embedding"} <= changed
    assert any(".context." in name for name in changed)
    assert all(UNet.is_inlet(name) for name in changed)


def test_a_decoder_of_other_latents_is_refused(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(decoder, folders, tmp_path / "one", 1)
    file = UNet.file_in(tmp_path / "one")
    other = UNet(replace(UNet.config_of(tmp_path / "one"), channels=2))
    other.save(file.parent)
    with pytest.raises(SystemExit):
        decoder_from(folders, tmp_path / "two", tmp_path / "one")
    assert (
        "has latents of 2 channels, and the data latents of 4 channels" in capsys.readouterr().err
    )
