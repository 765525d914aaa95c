"""Models that several files of tests sample from: one without a CLIP, and the same with one."""

from __future__ import annotations

import pytest
import torch
from tiny_model import tiny_model

from dalle1 import DallE
from dalle1.clip import ClipArch, new_clip


@pytest.fixture(scope="package")
def plain() -> DallE:
    return tiny_model(scale=0.5)  # captions and seeds change its images


@pytest.fixture(scope="package")
def ranked(plain: DallE) -> DallE:
    torch.manual_seed(0)
    small = {"width": 32, "layers": 1, "text_width": 32, "text_layers": 1, "embed_dim": 16}
    clip = new_clip(plain.tokenizer, ClipArch(image_size=32, text_len=12, **small))
    return DallE(plain.image_tokenizer, plain.transformer, plain.tokenizer, clip)
