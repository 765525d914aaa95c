"""A whole model with tiny random parts, and a folder of images for it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dalle1 import DallE
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.text.bpe import Tokenizer
from dvae import DVAE, DVAEConfig

CAPTIONS = [f"a {fill} {noun}" for fill in ("red", "blue") for noun in ("cube", "teapot", "star")]


def tiny_model(scale: float = 0.3, **sizes: object) -> DallE:
    """Return a model of 16 codes on a 4 × 4 grid, with 8 text positions."""
    torch.manual_seed(0)
    small = {"width": 4, "blocks_per_group": 1, "code_width": 8}
    dvae = DVAE(DVAEConfig(image_size=32, codebook_size=16, **small)).eval()
    default = {"text_vocab": 270, "text_len": 8, "codebook_size": 16, "grid_size": 4}
    transformer = Transformer(
        TransformerConfig(**{**default, "width": 16, "depth": 2, "heads": 2, **sizes})
    ).eval()
    with torch.no_grad():
        dvae.decoder.input.weight.mul_(10)  # colours that differ from code to code
        for parameter in transformer.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape))
    return DallE(dvae, transformer, Tokenizer.train(CAPTIONS, 270))


def write_images(folder: Path, count: int = 6) -> list[Path]:
    """Write images of one colour each, with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i}.png"
        Image.new("RGB", (40, 36), (40 * i, 250 - 40 * i, 90)).save(path)
        path.with_suffix(".txt").write_text(CAPTIONS[i % len(CAPTIONS)], encoding="utf-8")
    return sorted(folder.glob("*.png"))
