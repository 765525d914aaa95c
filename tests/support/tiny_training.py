"""Trainings of all parts of a tiny DALL·E 2."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tiny_model import CAPTIONS, write_images

from dalle1.clip import ClipArch, new_clip
from dalle1.text.bpe import Tokenizer
from dalle1.training.checkpoint import TENSORS_NAME
from dalle2 import embedded
from dalle2.tasks import ar_prior, autoencoder, decoder, prior, upsampler

COMMON = [
    *("--batch-size", "4", "--num-workers", "0", "--device", "cpu", "--precision", "fp32"),
    *("--log-every", "1", "--schedule-steps", "3", "--warmup-steps", "1"),
]
AUTOENCODER = [
    *("small", "--model.image-size", "16", "--model.width", "4", "--model.code-width", "8"),
    *("--model.latent-channels", "4", "--crop-size", "16", "--validation-images", "4", *COMMON),
]
DECODER = [
    *("small", "--model.width", "8", "--model.multipliers", "1", "--model.blocks", "1"),
    *("--model.attention", "2", "--model.head-width", "8", "--validation-pairs", "4", *COMMON),
]
PRIOR = [
    *("small", "--model.width", "16", "--model.depth", "1", "--model.heads", "2"),
    *("--sampling-steps", "2", "--validation-pairs", "4", *COMMON),
]
AR_PRIOR = [
    *("small", "--model.width", "16", "--model.depth", "1", "--model.heads", "2"),
    *("--model.grid-size", "2", "--model.buckets", "16", "--model.text-len", "8"),
    *("--validation-pairs", "4", *COMMON),
]
UPSAMPLER = [
    *("small", "--model.image-size", "32", "--model.width", "8", "--model.multipliers", "1", "2"),
    *("--model.blocks", "1", "--crop-size", "8", "--validation-images", "4", *COMMON),
]


class Folders(NamedTuple):
    images: Path
    autoencoder: Path
    clip: Path
    embedded: Path


def save_clip(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    size = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "embed_dim": 8}
    arch = ClipArch(**size, text_width=32, text_layers=1, text_len=12)
    new_clip(Tokenizer.train(CAPTIONS, 270), arch).save_pretrained(folder)
    return folder


def make_folders(root: Path) -> Folders:
    """Write images, a CLIP, an autoencoder, and the images embedded by both."""
    found = Folders(root / "images", root / "autoencoder", root / "clip", root / "embedded")
    write_images(found.images, 40)
    save_clip(found.clip, 0)
    out = ["--data", str(found.images), "--out", str(found.autoencoder), "--steps", "2"]
    autoencoder.main([*AUTOENCODER, *out])
    models = ["--autoencoder", str(found.autoencoder), "--clip", str(found.clip)]
    embedded.main(
        [*models, "--data", str(found.images), "--out", str(found.embedded), "--num-workers", "0"]
    )
    return found


def train(module: object, folders: Folders, out: Path, steps: int) -> dict[str, torch.Tensor]:
    flags = ["--data", str(folders.embedded), "--clip", str(folders.clip)]
    if module is decoder:
        flags += ["--autoencoder", str(folders.autoencoder)]
    if module is upsampler:
        flags = ["--data", str(folders.images)]
    presets = {decoder: DECODER, prior: PRIOR, ar_prior: AR_PRIOR, upsampler: UPSAMPLER}
    words = [*presets[module], *flags, "--out", str(out), "--steps", str(steps)]  # type: ignore[index]
    module.main(words)  # type: ignore[attr-defined]
    return load_file(out / "latest" / TENSORS_NAME)
