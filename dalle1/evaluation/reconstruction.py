"""How well an image tokenizer reconstructs images: PSNR, likelihood, use of its codebook."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dalle1.data import Example, ReadOptions, Sample, first_examples, open_source
from dalle1.data.crops import centre_square
from dalle1.data.images import grid, save_png, to_float, to_pil, to_tensor
from dalle1.devices import autocast, pick_device
from dalle1.evaluation.report import Scores
from dalle1.image_tokenizer import ImageTokenizer, load_image_tokenizer
from dvae.gumbel import gumbel_softmax
from dvae.losses import dvae_loss, kl_to_uniform, psnr
from dvae.model import DVAE, reconstruction

RECONSTRUCTIONS = "reconstructions.png"
SHOWN = 16  # images in it


@dataclass(frozen=True, kw_only=True)
class DVAEOptions:
    """Measure a dVAE or VQGAN on validation images, and save some reconstructions."""

    model: Path
    """Folder of the image tokenizer, or bundled."""
    data: str = "toybox"
    """Dataset, as in training."""
    images: int = 1000
    """Maximum number of images."""
    temperature: float = 1 / 16
    """Temperature of the relaxed codes."""
    allow_upscale: bool = False
    """Enlarge images that are too small. By default, they are skipped."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else mps, else cpu."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of convolutions."""
    out: Path = Path("runs/dvae-evaluation")
    """Folder for dvae.json and reconstructions.png."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images is {self.images}, expected at least 1")


def evaluate_dvae(options: DVAEOptions) -> Scores:
    """Yield the metrics of an image tokenizer, and write reconstructions.png."""
    device = pick_device(options.device)
    model = load_image_tokenizer(options.model, device)
    size = model.image_size
    prepare = partial(_prepare, size, options.allow_upscale)
    source = open_source(options.data, "validation", ReadOptions(size=size, captions=False))
    images = to_float(first_examples(source, prepare, options.images)["images"]).to(device)
    yield "images", len(images)
    yield "codebook size", model.codebook_size
    with autocast(device, options.precision):
        if isinstance(model, DVAE):
            yield from reconstruction_metrics(model, images, options.temperature)
        else:
            yield from tokenizer_metrics(model, images)
        shown = images[:SHOWN]
        reconstructions = model.decode(model.encode(shown))
    rows = to_pil(torch.cat([shown, reconstructions]))
    save_png(grid(rows, SHOWN), options.out / RECONSTRUCTIONS)


def _prepare(size: int, allow_upscale: bool, sample: Sample, _: random.Random) -> Example:
    return {"images": to_tensor(centre_square(sample.image(), size, allow_upscale))}


@torch.no_grad()
def reconstruction_metrics(
    model: DVAE,
    images: Tensor,
    temperature: float,
    batch_size: int = 32,
    likelihood: bool = True,
) -> Scores:
    """Yield the metrics of `model` on `images`, [N, 3, H, W] in [0, 1].

    They are: PSNR in dB and the ELBO (β = 1) in nats per colour value, each for hard codes (the
    argmax, which stage 2 uses) and for relaxed ones; the KL divergence per code in nats and in
    bits; the number of codes in use; and the perplexity of the codes.

    Args:
        temperature: of the relaxed codes.
        likelihood: whether to compute the ELBO, which needs a model trained with the likelihood.
    """
    usage = torch.zeros(model.codebook_size, device=images.device)
    sums: defaultdict[str, float] = defaultdict(float)
    generator = torch.Generator(images.device).manual_seed(0)
    for batch in images.split(batch_size):
        logits = model.logits(batch)
        codes = logits.argmax(-1)
        usage += codes.flatten().bincount(minlength=model.codebook_size)
        values = {"kl_nats": kl_to_uniform(logits).mean()}
        relaxed = gumbel_softmax(logits, temperature, generator)
        for name, z in (("hard", codes), ("relaxed", relaxed)):
            stats = model.decoder(z)
            values[f"psnr_{name}"] = psnr(batch, reconstruction(stats)).mean()
            if likelihood:
                values[f"elbo_{name}"] = -dvae_loss(batch, stats, logits, beta=1.0).total
        for key, value in values.items():
            sums[key] += float(value) * len(batch)
    for key, total in sums.items():
        yield key, total / len(images)
    yield "kl_bits", sums["kl_nats"] / len(images) / math.log(2)
    yield from _usage_metrics(usage)


@torch.no_grad()
def tokenizer_metrics(model: ImageTokenizer, images: Tensor, batch_size: int = 32) -> Scores:
    """Yield the metrics of any image tokenizer on `images`, [N, 3, H, W] in [0, 1].

    They are: PSNR in dB, the number of codes in use, and the perplexity of the codes.
    """
    usage = torch.zeros(model.codebook_size, device=images.device)
    total = 0.0
    for batch in images.split(batch_size):
        codes = model.encode(batch)
        usage += codes.flatten().bincount(minlength=model.codebook_size)
        total += float(psnr(batch, model.decode(codes)).sum())
    yield "psnr_hard", total / len(images)
    yield from _usage_metrics(usage)


def _usage_metrics(usage: Tensor) -> Scores:
    """Yield the number of codes in use and their perplexity, from how often each occurs."""
    yield "codes_used", float((usage > 0).sum())
    shares = usage / usage.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    yield "perplexity", float(entropy.exp())
