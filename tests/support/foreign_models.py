"""Tiny models with random weights, written by the classes of the packages that published them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import import_original
from tokenizers.implementations import CharBPETokenizer
from torch import Tensor, nn

from benchmarks.peers import dalle_pytorch

SIDE = 8
"""Codes along each side of their images."""
CODES = 64
REASON = "needs what dalle_pytorch imports; `make test` installs it"
IMPORTERS = Path(__file__).resolve().parents[1] / "importers"

VQGAN_SIZES: dict[str, Any] = {
    "double_z": False,
    "z_channels": 32,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "dropout": 0.0,
}


def tiny_vqgan(quantizer: nn.Module) -> Any:
    """Build taming's VQGAN from its parts, with random weights."""
    parts = import_original("taming.modules.diffusionmodules.model")
    model = nn.Module()
    model.encoder, model.decoder = parts.Encoder(**VQGAN_SIZES), parts.Decoder(**VQGAN_SIZES)
    model.quant_conv, model.post_quant_conv = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 1)
    model.quantize = quantizer
    return model.eval()


def randomized(model: nn.Module) -> nn.Module:
    """Fill all parameters with random numbers, those of norms and biases too."""
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3).add_(parameter.ndim == 1)
    return model.eval()


def _gumbel_files(folder: Path) -> tuple[Path, Path, Any]:
    quantize = import_original("taming.modules.vqvae.quantize")
    vqgan = tiny_vqgan(quantize.GumbelQuantize(16, 16, CODES))
    checkpoint, vocabulary = folder / "vqgan.ckpt", folder / "bpe.model"
    torch.save({"state_dict": vqgan.state_dict()}, checkpoint)
    fixture = json.loads((IMPORTERS / "youtokentome.json").read_text(encoding="utf-8"))
    vocabulary.write_text(fixture["model"], encoding="utf-8")
    return checkpoint, vocabulary, vqgan


_COMMON: dict[str, Any] = {
    "device": "cpu",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "embedding_dropout_prob": 0.1,
    "attention_dropout_prob": 0.1,
    "output_dropout_prob": 0.1,
    "image_tokens_per_dim": SIDE,
    "image_vocab_size": CODES,
    "cogview_sandwich_layernorm": True,
    "cogview_pb_relax": True,
}


def rudalle_files(folder: Path, version: str = "v3") -> tuple[list[Path], Any, Any]:
    """Write a ru-dalle; return its files, its transformer and its VQGAN."""
    package = import_original("rudalle.dalle.model", "rudalle", "rudalle.dalle")
    model = randomized(
        package.DalleModel(
            num_layers=3, vocab_size=97 + 8, text_seq_length=8, hf_version=version, **_COMMON
        )
    )
    checkpoint, vocabulary, vqgan = _gumbel_files(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return [folder / "pytorch_model.bin", checkpoint, vocabulary], model, vqgan


def rudolph_files(folder: Path) -> tuple[list[Path], Any, Any]:
    """Write a RuDOLPH; return its files, its transformer and its VQGAN."""
    package = import_original("rudolph.model.model", "rudolph", "rudolph.model")
    model = randomized(
        package.ruDolphModel(
            num_layers=5,
            vocab_size=97 + 8,
            l_text_seq_length=8,
            r_text_seq_length=8,
            kernel_size=7,
            last_kernel_size=9,
            text_special_tokens=10,
            image_special_tokens=6,
            **_COMMON,
        )
    )
    checkpoint, vocabulary, vqgan = _gumbel_files(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return [folder / "pytorch_model.bin", checkpoint, vocabulary], model, vqgan


def dalle_pytorch_file(folder: Path, **changes: Any) -> tuple[Path, Any]:
    """Write a model of DALLE-pytorch as its train_dalle.py does; return its file and the model."""
    pytest.importorskip("axial_positional_embedding", reason=REASON)
    pytest.importorskip("rotary_embedding_torch", reason=REASON)
    if importlib.util.find_spec("dalle_pytorch") is None:
        pytest.skip("needs the package dalle_pytorch; `make test` installs it")
    package = dalle_pytorch()
    vae_params = {
        "image_size": 4 * SIDE,
        "num_layers": 2,
        "num_tokens": CODES,
        "codebook_dim": 12,
        "hidden_dim": 8,
        "num_resnet_blocks": 1,
    }
    params: dict[str, Any] = {
        "num_text_tokens": 97,
        "text_seq_len": 7,
        "dim": 16,
        "depth": 4,
        "heads": 3,
        "dim_head": 4,
        "reversible": False,
        "shift_tokens": False,
        "rotary_emb": False,
        "attn_types": ("full", "axial_row", "axial_col"),
    } | changes
    model = randomized(package.DALLE(vae=package.DiscreteVAE(**vae_params), **params))
    path = folder / "dalle.pt"
    content = {"hparams": params, "vae_params": vae_params, "weights": model.state_dict()}
    torch.save(content, path)
    return path, model


Logits = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mindalle_folder(folder: Path) -> tuple[Path, Logits, Any]:
    """Write a minDALL-E; return its folder, its scores, and its VQGAN.

    It is not on PyPI. GPT-2 with the exact GELU and embeddings from outside computes the same.
    """
    from transformers import GPT2Config, GPT2Model

    depth, width, length = 2, 16, 8
    (folder / "tokenizer").mkdir()
    trained = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    texts = ["a red cat on a mat", "the red hat", "a cat and a rat"] * 9
    trained.train_from_iterator(texts, 60, 2, special_tokens=["[PAD]", "[UNK]"])
    trained.save_model(str(folder / "tokenizer"), "bpe-16k")
    vocab = trained.get_vocab_size()
    quantize = import_original("taming.modules.vqvae.quantize")
    vqgan = tiny_vqgan(quantize.VectorQuantizer2(CODES, 16, beta=0.25))
    torch.save({"state_dict": vqgan.state_dict()}, folder / "stage1_last.ckpt")
    config = GPT2Config(
        n_embd=width,
        n_layer=depth,
        n_head=2,
        n_positions=length + SIDE**2,
        vocab_size=1,
        activation_function="gelu",
    )
    gpt = randomized(GPT2Model(config))
    gpt.wpe.weight.data.zero_()
    state = {
        "tok_emb_txt.weight": torch.randn(vocab, width),
        "tok_emb_img.weight": torch.randn(CODES, width),
        "pos_emb_txt.weight": torch.randn(length, width),
        "pos_emb_img.weight": torch.randn(SIDE**2, width),
        "head_txt.weight": torch.randn(vocab, width),
        "head_img.weight": torch.randn(CODES, width),
        "ln_f.weight": gpt.ln_f.weight,
        "ln_f.bias": gpt.ln_f.bias,
    }
    for i, block in enumerate(gpt.h):
        qkv = zip(block.attn.c_attn.weight.chunk(3, 1), block.attn.c_attn.bias.chunk(3))
        for name, (weight, bias) in zip(("query", "key", "value"), qkv):
            state[f"blocks.{i}.attn.{name}.weight"] = weight.T.contiguous()
            state[f"blocks.{i}.attn.{name}.bias"] = bias.contiguous()
        for name, linear in (
            ("attn.proj", block.attn.c_proj),
            ("mlp.0", block.mlp.c_fc),
            ("mlp.2", block.mlp.c_proj),
        ):
            state[f"blocks.{i}.{name}.weight"] = linear.weight.T.contiguous()
            state[f"blocks.{i}.{name}.bias"] = linear.bias
        for name, norm in (("ln1", block.ln_1), ("ln2", block.ln_2)):
            state[f"blocks.{i}.{name}.weight"] = norm.weight
            state[f"blocks.{i}.{name}.bias"] = norm.bias
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    torch.save({"state_dict": state}, folder / "stage2_last.ckpt")

    def logits(text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        x = state["tok_emb_txt.weight"][text] + state["pos_emb_txt.weight"]
        y = state["tok_emb_img.weight"][codes] + state["pos_emb_img.weight"][: codes.shape[1]]
        states = gpt(inputs_embeds=torch.cat([x, y], 1)).last_hidden_state
        return (
            states[:, : length - 1] @ state["head_txt.weight"].T,
            states[:, length - 1 :] @ state["head_img.weight"].T,
        )

    return folder, logits, vqgan
