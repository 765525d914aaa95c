"""OpenAI's dVAE: read bit for bit, and nothing in a pickle run."""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle1.importers import openai_dvae
from dvae import DVAE
from dvae.losses import squeeze_pixels

dall_e = pytest.importorskip("dall_e", reason="needs the package DALL-E; `make test` installs it")

Modules = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def released() -> Modules:
    """An encoder and a decoder of the package, narrow, with random weights."""
    torch.manual_seed(0)
    encoder = dall_e.Encoder(n_hid=64, n_blk_per_group=2, vocab_size=512)
    decoder = dall_e.Decoder(n_hid=64, n_blk_per_group=2, n_init=16, vocab_size=512)
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            if name.endswith(".b"):
                parameter.data.normal_()
    return encoder, decoder


def pickles(folder: Path, *modules: Any, **how: Any) -> list[Path]:
    paths = [folder / f"{name}.pkl" for name in ("encoder", "decoder")]
    for module, path in zip(modules, paths):
        torch.save(module, path, **how)
    return paths


def test_imported_is_the_original_bit_for_bit(tmp_path: Path, released: Modules) -> None:
    encoder, decoder = released
    paths = pickles(tmp_path, encoder, decoder)
    model = openai_dvae.load_openai_dvae(*paths)
    assert (model.config.width, model.config.code_width, model.codebook_size) == (64, 16, 512)
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    # The same arithmetic in the same order: both with channels last.
    squeezed = squeeze_pixels(images).contiguous(memory_format=torch.channels_last)
    assert torch.equal(squeezed, dall_e.map_pixels(images))
    with torch.no_grad():
        logits = encoder.to(memory_format=torch.channels_last)(squeezed)
        assert torch.equal(model.logits(images), logits.permute(0, 2, 3, 1))
        codes = logits.argmax(1)
        assert torch.equal(model.encode(images), codes)
        one_hot = F.one_hot(codes, 512).permute(0, 3, 1, 2).float()
        stats = decoder(one_hot)
        assert torch.equal(model.decoder(codes), stats)
        decoded = dall_e.unmap_pixels(torch.sigmoid(stats[:, :3]))
        assert torch.equal(model.decode(codes), decoded)


def test_command(tmp_path: Path, released: Modules, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in pickles(tmp_path, *released)]
    openai_dvae.main([*paths, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "dvae.safetensors" in printed
    assert "License of the published weights: modified MIT" in printed
    kept, imported = DVAE.load(tmp_path / "out"), openai_dvae.load_openai_dvae(*paths)
    assert kept.config == imported.config
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), imported.parameters()))
    with pytest.raises(SystemExit):
        openai_dvae.main([*paths[::-1], "--out", str(tmp_path / "out")])
    assert (
        "the first file should be encoder.pkl and the second decoder.pkl" in capsys.readouterr().err
    )


class Hostile:
    """Pickled, it is a call of os.mkdir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("where", ["whole", "attribute"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, where: str) -> None:
    payload: Any = Hostile(tmp_path / "run")
    if where == "attribute":
        payload, inner = dall_e.Encoder(n_hid=64, vocab_size=512), payload
        payload.blocks.input.hidden = inner
    decoder = dall_e.Decoder(n_hid=64, n_init=16, vocab_size=512)
    paths = pickles(tmp_path, payload, decoder)
    with pytest.raises(ValueError, match=r"nothing in it was run: it names (posix|nt)\.mkdir"):
        openai_dvae.load_openai_dvae(*paths)
    assert not (tmp_path / "run").exists()
    torch.load(paths[0], weights_only=False)  # it does work where it is run
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["old", "tar"])
def test_other_formats_of_torch_are_refused(tmp_path: Path, released: Modules, how: str) -> None:
    paths = pickles(tmp_path, *released, _use_new_zipfile_serialization=how != "old")
    if how == "tar":
        with tarfile.open(paths[0], "w") as tar:
            tar.add(paths[1], "storages")
    with pytest.raises(ValueError, match=r"is no file that torch 1\.6 or later has written"):
        openai_dvae.load_openai_dvae(*paths)


def test_what_is_no_such_pickle_is_refused(tmp_path: Path, released: Modules) -> None:
    paths = pickles(tmp_path, *released)
    half, text, other, larger = (tmp_path / f"{n}.pkl" for n in ("half", "text", "other", "larger"))
    half.write_bytes(paths[0].read_bytes()[:5000])
    text.write_text("not found")
    torch.save({"a": torch.zeros(1)}, other)
    torch.save(dall_e.Encoder(n_hid=64, vocab_size=600), larger)
    for path, message in (
        (half, "cannot be read, and nothing in it was run"),
        (text, r"is no file that torch 1\.6 or later has written"),
        (other, "holds a dict, expected a pickled module"),
        (larger, "does not match the paper's dVAE .*size mismatch"),
    ):
        with pytest.raises(ValueError, match=message):
            openai_dvae.load_openai_dvae(path, paths[1])
    with pytest.raises(FileNotFoundError):
        openai_dvae.load_openai_dvae(tmp_path / "nothing.pkl", paths[1])


def test_importing_does_not_need_the_package(
    tmp_path: Path, released: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = pickles(tmp_path, *released)
    for name in [n for n in sys.modules if n.partition(".")[0] == "dall_e"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert openai_dvae.read_module(paths[0])["output.weight"].shape == (512, 512, 1, 1)
