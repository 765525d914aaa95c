"""Foreign transformers: scores, codes and images equal those of the originals' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import (
    CODES,
    IMPORTERS,
    SIDE,
    dalle_pytorch_file,
    mindalle_folder,
    rudalle_files,
    rudolph_files,
    tiny_vqgan,
)
from originals import import_original
from torch import Tensor

from dalle1 import DallE
from dalle1.commands import sample
from dalle1.compression.codec import Codec
from dalle1.image_tokenizer import load_image_tokenizer
from dalle1.importers import dalle_pytorch, mindalle, rudalle, rudolph
from dalle1.model.transformer import Transformer
from dalle1.sampling.decoding import candidate_uniforms, generate
from dalle1.sampling.filters import Sampling

pytestmark = pytest.mark.usefixtures("seeded")
GREEDY = Sampling(temperature=0)


def stream(model: Transformer) -> tuple[Tensor, Tensor]:
    """Return two captions with padding, [2, L], and codes [2, N]."""
    config = model.config
    text = torch.randint(4, config.text_vocab, (2, config.text_len))
    pads = torch.arange(config.text_len) + config.text_vocab
    text = torch.where(torch.arange(config.text_len) < torch.tensor([[3], [5]]), text, pads)
    return text, torch.randint(0, config.codebook_size, (2, config.image_len))


def without_pads(text: Tensor, model: Transformer) -> Tensor:
    """Return captions with zeros as their padding, as the originals take them."""
    return text.where(text < model.config.text_vocab, 0)


def assert_near(ours: Tensor, theirs: Tensor, limit: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < limit


def greedy(model: Transformer, logits: Any, text: Tensor) -> Tensor:
    """Sample codes [B, N] with the original's logits of text and codes, without a cache."""
    codes = text.new_zeros(len(text), 0)
    for _ in range(model.config.image_len):
        codes = torch.cat([codes, logits(text, codes)[:, -1:].argmax(-1)], 1)
    return codes


def check_decoding(model: Transformer, logits: Any, text: Tensor) -> None:
    """Check that our cached sampling chooses the codes of the original, and the codec's return."""
    uniforms = candidate_uniforms(0, range(1), model.config.image_len)
    ours = generate(model, text, uniforms, GREEDY)
    assert torch.equal(ours.flatten(1), greedy(model, logits, text))
    codec, (captions, codes) = Codec(model), stream(model)
    grids = codes.view(-1, model.config.grid_size, model.config.grid_size)
    message = codec.encode(captions, grids)
    again = codec.decode(message, len(grids), "range", images=True, captions=True)
    assert torch.equal(again[0], captions)
    assert torch.equal(again[1], grids)


def sampled(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    """Sample two images through the command."""
    options = ["--model", str(folder), "--device", "cpu", "--num-candidates", "2", "--seed", "3"]
    sample.main([prompt, *options, "--out", str(out)])
    assert len(json.loads((out / "scores.json").read_text())) == 2
    capsys.readouterr()


@torch.no_grad()
@pytest.mark.parametrize("family", ["rudalle", "rudolph"])
def test_rudalle_and_rudolph(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files, original, image_model = (rudalle_files if family == "rudalle" else rudolph_files)(
        tmp_path
    )
    module = rudalle if family == "rudalle" else rudolph
    module.main([*map(str, files), "--heads", "2", "--out", str(tmp_path / "model")])
    printed = capsys.readouterr()
    assert "apache-2.0" in printed.out
    assert "not part of the model" not in printed.err
    pipeline = DallE.from_pretrained(tmp_path / "model", device="cpu")
    model = pipeline.transformer
    config = model.config
    text, codes = stream(model)

    def logits(text: Tensor, codes: Tensor) -> Tensor:
        ids = torch.cat([without_pads(text, model), codes], 1)
        found = original(ids, torch.ones(1, 1, config.length, config.length).tril())[0]
        first = config.text_vocab + config.text_len
        return found[:, config.text_len - 1 :, first : first + config.codebook_size]

    whole = original(
        torch.cat([without_pads(text, model), codes], 1),
        torch.ones(1, 1, config.length, config.length).tril(),
    )[0]
    text_logits, image_logits = model(text, codes)
    assert_near(image_logits, logits(text, codes)[:, :-1])
    assert_near(text_logits, whole[:, : config.text_len - 1, : config.text_vocab + config.text_len])
    check_decoding(model, logits, text)
    grids = codes.view(2, SIDE, SIDE)
    vectors = image_model.quantize.embed(grids).permute(0, 3, 1, 2)
    decoded = image_model.decoder(image_model.post_quant_conv(vectors))
    ours = pipeline.image_tokenizer.decode(grids)
    torch.testing.assert_close(ours, decoded.clamp(-1, 1) / 2 + 0.5, rtol=0, atol=2e-5)
    begins = [2, 59] if family == "rudalle" else [2, 97 + 2]
    assert pipeline.encode_prompt("рыжий кот")[:2].tolist() == begins
    sampled(tmp_path / "model", tmp_path / "out", capsys, "рыжий кот")


@torch.no_grad()
def test_mindalle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, logits, image_model = mindalle_folder(tmp_path)
    mindalle.main([str(folder), "--heads", "2", "--out", str(tmp_path / "model")])
    assert "cc-by-nc-sa-4.0: no commercial use" in capsys.readouterr().out
    pipeline = DallE.from_pretrained(tmp_path / "model", device="cpu")
    model = pipeline.transformer
    config = model.config
    text, codes = stream(model)
    pad = mindalle.load_tokenizer(*(folder / name for name in mindalle.FILES[2:])).format.pad_id

    def theirs(text: Tensor, codes: Tensor) -> Tensor:
        text_ids = text.where(text < config.text_vocab, torch.tensor(pad))
        return logits(text_ids, codes)[1]

    text_logits, image_logits = model(text, codes)
    assert_near(image_logits, theirs(text, codes)[:, :-1])
    text_ids = text.where(text < config.text_vocab, torch.tensor(pad))
    assert_near(text_logits[..., : config.text_vocab], logits(text_ids, codes)[0])
    assert (text_logits.softmax(-1)[..., config.text_vocab :] == 0).all()
    check_decoding(model, theirs, text)
    images = torch.rand(1, 3, 4 * SIDE, 4 * SIDE)
    found = image_model.quantize(image_model.quant_conv(image_model.encoder(2 * images - 1)))[2][2]
    assert torch.equal(pipeline.image_tokenizer.encode(images).flatten(), found.flatten())
    sampled(tmp_path / "model", tmp_path / "out", capsys, "a red cat")


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"sandwich_norm": True, "share_input_output_emb": True}, {"stable": True}]
)
def test_dalle_pytorch(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, original = dalle_pytorch_file(tmp_path, **changes)
    vocabulary = tmp_path / "bpe.model"
    vocabulary.write_text(
        json.loads((IMPORTERS / "youtokentome.json").read_text(encoding="utf-8"))["model"],
        encoding="utf-8",
    )
    dalle_pytorch.main([str(path), str(vocabulary), "--out", str(tmp_path / "model")])
    assert "not part of the model" not in capsys.readouterr().err
    pipeline = DallE.from_pretrained(tmp_path / "model", device="cpu")
    model = pipeline.transformer
    config = model.config
    text, codes = stream(model)
    text[:, 0] = 0  # the start of text

    def logits(text: Tensor, codes: Tensor) -> Tensor:
        found = original(without_pads(text, model)[:, 1:], codes)
        return found[:, config.text_len - 1 :, 97 + 7 :]

    text_logits, image_logits = model(text, codes)
    limit = 1e-4 if changes.get("stable") else 1e-5  # it scales what LayerNorm adds its eps to
    assert_near(image_logits, logits(text, codes), limit)
    whole = original(without_pads(text, model)[:, 1:], codes)[:, : config.text_len - 1, : 97 + 7]
    ours = torch.cat([text_logits[..., :97], text_logits[..., 98:]], -1)  # but for the start's pad
    assert_near(ours, whole, limit)
    check_decoding(model, logits, text)
    grids = codes.view(2, SIDE, SIDE)
    decoded = (original.vae.decode(codes) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipeline.image_tokenizer.decode(grids), decoded)
    images = torch.rand(2, 3, 4 * SIDE, 4 * SIDE)
    found = pipeline.image_tokenizer.encode(images).flatten(1)
    assert torch.equal(found, original.vae.get_codebook_indices(images))
    assert pipeline.encode_prompt("кот").tolist() == [0, 29, *range(97 + 2, 97 + 8)]
    sampled(tmp_path / "model", tmp_path / "out", capsys, "рыжий кот")


@torch.no_grad()
def test_the_vqgan_of_dalle_pytorch(tmp_path: Path) -> None:
    path, _ = dalle_pytorch_file(tmp_path)
    content = torch.load(path, weights_only=True)
    quantize = import_original("taming.modules.vqvae.quantize")
    image_model = tiny_vqgan(quantize.VectorQuantizer2(CODES, 16, beta=0.25))
    weights = {k: t for k, t in content["weights"].items() if not k.startswith("vae.")}
    weights |= {f"vae.model.{name}": tensor for name, tensor in image_model.state_dict().items()}
    torch.save({**content, "weights": weights, "vae_params": None}, path)
    params, tensors, vae_params = dalle_pytorch.read_checkpoint(path)
    model = dalle_pytorch.load_image_tokenizer(
        tensors, vae_params, dalle_pytorch.load_transformer(tensors, params)
    )
    images = torch.rand(1, 3, 4 * SIDE, 4 * SIDE)
    codes = image_model.quantize(image_model.quant_conv(image_model.encoder(2 * images - 1)))[2][2]
    assert torch.equal(model.encode(images).flatten(), codes.flatten())


@torch.no_grad()
def test_the_dvae_of_openai_in_dalle_pytorch(tmp_path: Path) -> None:
    dall_e = pytest.importorskip("dall_e", reason="needs the package DALL-E; `make test` installs")
    path, _ = dalle_pytorch_file(tmp_path)
    content = torch.load(path, weights_only=True)
    encoder = dall_e.Encoder(n_hid=8, n_blk_per_group=1, vocab_size=CODES).eval()
    decoder = dall_e.Decoder(n_hid=8, n_blk_per_group=1, n_init=16, vocab_size=CODES).eval()
    weights = {k: t for k, t in content["weights"].items() if not k.startswith("vae.")}
    for part, module in (("enc", encoder), ("dec", decoder)):
        weights |= {f"vae.{part}.{name}": t for name, t in module.state_dict().items()}
    torch.save({**content, "weights": weights, "vae_params": None}, path)
    params, tensors, vae_params = dalle_pytorch.read_checkpoint(path)
    transformer = dalle_pytorch.load_transformer(tensors, params)
    model = dalle_pytorch.load_image_tokenizer(tensors, vae_params, transformer)
    assert (model.grid_size, model.image_size) == (SIDE, 8 * SIDE)
    images = torch.rand(1, 3, 8 * SIDE, 8 * SIDE)
    codes = encoder(dall_e.map_pixels(images)).argmax(1)
    assert torch.equal(model.encode(images), codes)
    one_hot = torch.nn.functional.one_hot(codes, CODES).permute(0, 3, 1, 2).float()
    decoded = dall_e.unmap_pixels(torch.sigmoid(decoder(one_hot)[:, :3]))
    torch.testing.assert_close(model.decode(codes), decoded)


@torch.no_grad()
def test_a_dvae_of_dalle_pytorch_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, original = dalle_pytorch_file(tmp_path)
    content = torch.load(path, weights_only=True)
    vae = {"hparams": content["vae_params"], "weights": original.vae.state_dict()}
    torch.save(vae, tmp_path / "vae.pt")
    dalle_pytorch.main([str(tmp_path / "vae.pt"), "--out", str(tmp_path / "out")])
    assert "License of the published weights: unknown" in capsys.readouterr().out
    model = load_image_tokenizer(tmp_path / "out")
    images = torch.rand(2, 3, 4 * SIDE, 4 * SIDE)
    codes = original.vae.get_codebook_indices(images)
    assert torch.equal(model.encode(images).flatten(1), codes)
    with pytest.raises(SystemExit):  # a transformer needs a vocabulary
        dalle_pytorch.main([str(path), "--out", str(tmp_path / "out")])
    assert "no vocabulary is named; add the one of its training" in capsys.readouterr().err
