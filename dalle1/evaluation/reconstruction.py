"""How well a dVAE reconstructs images: PSNR, likelihood, and how it uses its codebook."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from dvae.gumbel import gumbel_softmax
from dvae.losses import dvae_loss, kl_to_uniform, psnr
from dvae.model import DVAE, reconstruction


@torch.no_grad()
def reconstruction_metrics(
    model: DVAE,
    images: Tensor,
    temperature: float,
    batch_size: int = 32,
    likelihood: bool = True,
) -> Iterator[tuple[str, float]]:
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
    for key, value in sums.items():
        yield key, value / len(images)
    yield "kl_bits", sums["kl_nats"] / len(images) / math.log(2)
    yield "codes_used", float((usage > 0).sum())
    shares = usage / usage.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    yield "perplexity", float(entropy.exp())
