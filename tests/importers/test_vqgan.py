"""Foreign VQGANs: equal to the originals' own classes; other files are refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import VQGAN_SIZES, tiny_vqgan
from originals import import_original
from torch import Tensor

from dalle1.image_tokenizer import load_image_tokenizer
from dalle1.importers import vqgan
from dalle1.vqgan import VQGAN, VQGANConfig


class AttributeDict(dict[str, Any]):
    """A dict whose entries are attributes, as ru-dalle reads its config."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pixels(decoded: Tensor) -> Tensor:
    return decoded.clamp(-1, 1) / 2 + 0.5


@torch.no_grad()
def test_nearest_codes(tmp_path: Path) -> None:
    quantize = import_original("taming.modules.vqvae.quantize")
    model = tiny_vqgan(quantize.VectorQuantizer2(64, 16, beta=0.25))
    path, images = tmp_path / "last.ckpt", torch.rand(2, 3, 64, 64)
    state = {**model.state_dict(), "loss.discriminator.weight": torch.zeros(1)}
    torch.save({"state_dict": state, "epoch": 1}, path)
    ours = vqgan.load_vqgan(path, image_size=64)
    quantized, _, (_, _, codes) = model.quantize(model.quant_conv(model.encoder(2 * images - 1)))
    assert torch.equal(ours.encode(images), codes.view(2, 16, 16))
    decoded = pixels(model.decoder(model.post_quant_conv(quantized)))
    torch.testing.assert_close(ours.decode(ours.encode(images)), decoded, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("wavelets", [False, True])
def test_gumbel_codes(tmp_path: Path, wavelets: bool) -> None:
    quantize = import_original("taming.modules.vqvae.quantize")
    model = tiny_vqgan(quantize.GumbelQuantize(16, 16, 64))
    state = model.state_dict()
    if wavelets:
        pytest.importorskip("pywt", reason="needs PyWavelets; `make test` installs it")
        dwt = import_original("rudalle.vae.decoder_dwt", "rudalle", "rudalle.vae")
        decoder = dwt.DecoderDWT(AttributeDict(VQGAN_SIZES, out_ch=12), 16).eval()
        state = {k: v for k, v in state.items() if not k.startswith(("decoder.", "post_"))}
        state |= {f"decoder.{name}": v for name, v in decoder.state_dict().items()}
        state = {f"model.{name}": v for name, v in state.items()}
    path, side = tmp_path / "vqgan.ckpt", 128 if wavelets else 64
    torch.save(state if wavelets else {"state_dict": state}, path)
    ours = vqgan.load_vqgan(path, side)
    images = torch.rand(2, 3, 64, 64)
    codes = model.quantize.proj(model.quant_conv(model.encoder(2 * images - 1))).argmax(1)
    shown = images.repeat_interleave(2, 2).repeat_interleave(2, 3) if wavelets else images
    assert torch.equal(ours.encode(shown), codes)
    vectors = model.quantize.embed(codes).permute(0, 3, 1, 2)
    if wavelets:
        decoded = decoder(decoder.post_quant_conv(vectors))
    else:
        decoded = model.decoder(model.post_quant_conv(vectors))
    torch.testing.assert_close(ours.decode(codes), pixels(decoded), rtol=0, atol=2e-5)


def tiny(**changes: Any) -> VQGAN:
    sizes: dict[str, Any] = {"image_size": 64, "width": 32, "multipliers": (1, 2, 2), "blocks": 1}
    sizes |= {"attention": (2,), "latent_width": 32, "code_width": 8, "codebook_size": 64}
    return VQGAN(VQGANConfig(**{**sizes, **changes})).eval()


def as_llamagen(name: str) -> str:
    """Rename a parameter as LlamaGen does: levels of the decoder from the lowest resolution."""
    name = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.conv_blocks.\1.res.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1.", name)
    for i, part in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{part}.", f".mid.{i}.")
    if match := re.match(r"decoder\.up\.(\d+)\.(.*)", name):
        rest = re.sub(r"^block\.", "res.", match[2])
        name = f"decoder.conv_blocks.{2 - int(match[1])}.{rest}"
    return name


@pytest.mark.parametrize("with_use", [True, False])
def test_llamagen(tmp_path: Path, with_use: bool) -> None:
    model, path = tiny(quantizer="normalized"), tmp_path / "vq.pt"
    state = {as_llamagen(name): tensor for name, tensor in model.state_dict().items()}
    assert "decoder.conv_blocks.0.upsample.conv.weight" in state
    if with_use:  # of its codes in training
        state["quantize.codebook_used"] = torch.zeros(10)
    torch.save({"model": state, "steps": 1}, path)
    ours = vqgan.load_vqgan(path, image_size=64)
    assert ours.config == model.config
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(ours.decode(ours.encode(images)), model.decode(model.encode(images)))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": tiny().state_dict()}, path)
    vqgan.main([str(path), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "64 codes, 4×4 pixels each" in printed
    assert "License of the published weights: MIT for taming" in printed
    assert load_image_tokenizer(tmp_path / "out").image_size == 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(1)}, "has 0 tensors called encoder.conv_in.weight"),
        ({"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}, "does not match a VQGAN"),
        ([1, 2], "holds a list, expected a state dict"),
        ({"state_dict": {}}, "holds no tensors"),
        (VQGANConfig(), "nothing in it was run: it names dalle1.vqgan.model.VQGANConfig"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(message)):
        vqgan.load_vqgan(path)


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    state = tiny().state_dict()
    del state["decoder.norm_out.weight"]
    path = tmp_path / "last.ckpt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"decoder\.norm_out\.weight"):
        vqgan.load_vqgan(path)


def test_files_that_are_missing_or_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        vqgan.load_vqgan(tmp_path / "none.ckpt")
    text = tmp_path / "page.ckpt"
    text.write_text("<html>")
    with pytest.raises(ValueError, match="expected the file as released"):
        vqgan.load_vqgan(text)
    text = text.rename(tmp_path / "page.safetensors")
    with pytest.raises(ValueError, match="cannot read"):
        vqgan.load_vqgan(text)
