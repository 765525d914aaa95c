"""A whole model with tiny random parts, and a folder of images for it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dalle1 import DallE
from dalle1.clip import Clip, ClipArch, new_clip
from dalle1.evaluation.classifier import FILE_NAME as CLASSIFIER_NAME
from dalle1.evaluation.classifier import ClassifierConfig, ToyboxClassifier, save_classifier
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.storage import CLIP_NAME
from dalle1.text.bpe import Tokenizer
from dalle2.autoencoder import Autoencoder, AutoencoderConfig
from dalle2.embedded import Encoders
from dalle2.prior import DiffusionPrior, PriorConfig
from dalle2.unet import UNet, UNetConfig
from dvae import DVAE, DVAEConfig

CAPTIONS = [f"a {fill} {noun}" for fill in ("red", "blue") for noun in ("cube", "teapot", "star")]
PROMPT = CAPTIONS[0]


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


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    """Whether images are equal, pixel for pixel."""
    return [image.tobytes() for image in a] == [image.tobytes() for image in b]


def write_images(folder: Path, count: int = 6) -> list[Path]:
    """Write images of one colour each, with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i}.png"
        Image.new("RGB", (40, 36), (40 * i, 250 - 40 * i, 90)).save(path)
        path.with_suffix(".txt").write_text(CAPTIONS[i % len(CAPTIONS)], encoding="utf-8")
    return sorted(folder.glob("*.png"))


def tiny_clip(tokenizer: Tokenizer) -> Clip:
    """Return a CLIP of images of 32 pixels."""
    size = {"image_size": 32, "layers": 1, "width": 32, "embed_dim": 8}
    return new_clip(tokenizer, ClipArch(text_len=8, text_width=32, text_layers=1, **size))


def save_whole_model(folder: Path) -> None:
    """Save a model with all its parts: a CLIP that reranks, known words, and a classifier."""
    model = tiny_model()
    model.clip = tiny_clip(model.tokenizer)
    model.save_pretrained(folder)
    classifier = ClassifierConfig(image_size=16, widths=(4, 8))
    save_classifier(ToyboxClassifier(classifier), folder / CLASSIFIER_NAME)


def save_unclip(folder: Path) -> None:
    """Save a model of DALL·E 2 with all its parts."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(image_size=16, width=4, code_width=8))
    encoder = tiny_clip(Tokenizer.train(CAPTIONS, 270))
    autoencoder.save(folder)
    encoder.save_pretrained(folder / CLIP_NAME)
    encoders = Encoders.of(folder, folder / CLIP_NAME)
    widths = {"embedding_width": 8, "text_width": 32}
    levels = {"multipliers": (1,), "blocks": 1, "attention": (2,), "head_width": 8}
    UNet(UNetConfig(width=8, side=2, **levels, **widths, encoders=str(encoders))).save(folder)
    prior = PriorConfig(width=16, depth=1, heads=2, **widths, clip=encoders.clip)
    DiffusionPrior(prior).save(folder)
