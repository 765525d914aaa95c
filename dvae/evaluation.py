"""How good a dVAE is: likelihood and reconstructions, relaxed and hard, and its use of codes."""

from __future__ import annotations

import torch
from torch import Tensor

from dvae.gumbel import gumbel_softmax
from dvae.losses import elbo_loss, psnr
from dvae.model import DVAE, reconstruction


@torch.no_grad()
def evaluate(
    model: DVAE, images: Tensor, temperature: float, batch_size: int = 32
) -> dict[str, float]:
    """Measure `model` on `images`, [N, 3, H, W] in [0, 1].

    Args:
        temperature: of the relaxed codes; the hard ones are the argmax, as stage 2 uses them.

    Returns: PSNR in dB and −ELBO (β = 1) in nats per colour value, hard and relaxed; KL in nats
    per code; how many codes occur, and the perplexity of their use.
    """
    counts = torch.zeros(model.vocab_size, device=images.device)
    sums: dict[str, float] = {}
    generator = torch.Generator(images.device).manual_seed(0)
    for batch in images.split(batch_size):
        logits = model.logits(batch)
        codes = logits.argmax(-1)
        counts += codes.flatten().bincount(minlength=model.vocab_size)
        for name, z in (
            ("hard", codes),
            ("relaxed", gumbel_softmax(logits, temperature, generator)),
        ):
            stats = model.decoder(z)
            loss = elbo_loss(batch, stats, logits, beta=1.0)
            values = {
                f"psnr_{name}": psnr(batch, reconstruction(stats)).mean(),
                f"loss_{name}": loss.total,
                "kl": loss.kl / 2,  # met once a way
            }
            for key, value in values.items():
                sums[key] = sums.get(key, 0.0) + float(value) * len(batch)
    use = counts / counts.sum()
    perplexity = torch.exp(-(use * use.clamp_min(1e-12).log()).sum())
    return {
        **{key: value / len(images) for key, value in sums.items()},
        "codes_used": float((counts > 0).sum()),
        "perplexity": float(perplexity),
    }
