"""How good a dVAE is: likelihood and reconstructions, relaxed and hard, and its use of codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dvae.gumbel import gumbel_softmax
from dvae.losses import dvae_loss, kl_to_uniform, psnr
from dvae.model import DVAE, reconstruction


@torch.no_grad()
def evaluate(
    model: DVAE,
    images: Tensor,
    temperature: float,
    batch_size: int = 32,
    likelihood: bool = True,
) -> dict[str, float]:
    """Measure `model` on `images`, [N, 3, H, W] in [0, 1].

    Args:
        temperature: of the relaxed codes; the hard ones are the argmax, as stage 2 uses them.
        likelihood: give the ELBO, which means something only where b was trained.

    Returns: PSNR in dB and the ELBO (β = 1) in nats per colour value, hard and relaxed; KL per code
    in nats and in bits; how many codes occur, and the perplexity of their use.
    """
    counts = torch.zeros(model.vocab_size, device=images.device)
    sums: dict[str, float] = {}
    generator = torch.Generator(images.device).manual_seed(0)
    for batch in images.split(batch_size):
        logits = model.logits(batch)
        codes = logits.argmax(-1)
        counts += codes.flatten().bincount(minlength=model.vocab_size)
        values = {"kl_nats": kl_to_uniform(logits).mean()}
        for name, z in (
            ("hard", codes),
            ("relaxed", gumbel_softmax(logits, temperature, generator)),
        ):
            stats = model.decoder(z)
            values[f"psnr_{name}"] = psnr(batch, reconstruction(stats)).mean()
            if likelihood:
                values[f"elbo_{name}"] = -dvae_loss(batch, stats, logits, beta=1.0).total
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + float(value) * len(batch)
    use = counts / counts.sum()
    perplexity = torch.exp(-(use * use.clamp_min(1e-12).log()).sum())
    means = {key: value / len(images) for key, value in sums.items()}
    return {
        **means,
        "kl_bits": means["kl_nats"] / math.log(2),
        "codes_used": float((counts > 0).sum()),
        "perplexity": float(perplexity),
    }
