"""A small CLIP with random weights, and images of noise for it."""

from __future__ import annotations

import random

import torch
from PIL import Image
from tiny_model import CAPTIONS

from dalle1.clip import Clip, ClipArch, new_clip
from dalle1.text.bpe import Tokenizer

SMALL = {"width": 32, "layers": 1, "text_width": 32, "text_layers": 1, "embed_dim": 16}


def noise_images(count: int = 4) -> list[Image.Image]:
    rng = random.Random(0)
    sizes = [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(count)]
    return [Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])) for size in sizes]


def small_clip() -> Clip:
    torch.manual_seed(0)
    return new_clip(Tokenizer.train(CAPTIONS, 300), ClipArch(image_size=32, text_len=12, **SMALL))
