"""Tiny random models of `DallE`, whose images differ from candidate to candidate."""

from __future__ import annotations

import torch
from PIL import Image

from dalle1 import DallE
from dalle1.clip import ClipArch, new_clip
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.text.bpe import Tokenizer
from dvae import DVAE, DVAEConfig

CAPTIONS = [f"a {fill} {noun}" for fill in ("red", "blue") for noun in ("cube", "teapot", "star")]
PROMPT = "a red cube"


def tiny_dvae(image_size: int = 32, codebook_size: int = 16) -> DVAE:
    torch.manual_seed(0)
    size = {"width": 4, "blocks_per_group": 1, "code_width": 8}
    dvae = DVAE(DVAEConfig(image_size=image_size, codebook_size=codebook_size, **size)).eval()
    with torch.no_grad():  # colours that differ from code to code
        dvae.decoder.input.weight.mul_(10)
    return dvae


def tiny_transformer(**sizes: int) -> Transformer:
    default = {"text_vocab": 270, "text_len": 8, "codebook_size": 16, "grid_size": 4}
    config = TransformerConfig(**{**default, "width": 16, "depth": 2, "heads": 2, **sizes})
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def plain_model() -> DallE:
    """Return a model without a CLIP."""
    tokenizer = Tokenizer.train(CAPTIONS, 270)
    assert tokenizer.vocab_size == 270
    return DallE(tiny_dvae(), tiny_transformer(), tokenizer)


def ranked_model(plain: DallE) -> DallE:
    """Return `plain` with a CLIP."""
    torch.manual_seed(0)
    small = {"width": 32, "layers": 1, "text_width": 32, "text_layers": 1, "embed_dim": 16}
    clip = new_clip(plain.tokenizer, ClipArch(image_size=32, text_len=12, **small))
    return DallE(plain.image_tokenizer, plain.transformer, plain.tokenizer, clip)


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return [x.tobytes() for x in a] == [x.tobytes() for x in b]
