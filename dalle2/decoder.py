"""Sample latents from a decoder: its denoiser under a condition, and candidates' own noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dalle2.conditioning import Caption
from dalle2.diffusion.guidance import Denoise, Denoiser, classifier_free
from dalle2.diffusion.noise import CandidateNoise
from dalle2.diffusion.samplers import SamplerName, sample
from dalle2.diffusion.schedule import Schedule
from dalle2.unet import UNet


def decoder_denoiser(
    model: UNet,
    embedding: Tensor,
    caption: Caption,
    *,
    guidance: float = 1.0,
    keep_embedding: Tensor | None = None,
    keep_caption: Tensor | None = None,
) -> Denoiser:
    """Return the decoder's denoiser under z_i [B, D] and captions, guided away from neither.

    Args:
        keep_embedding, keep_caption: bool [B]; None keeps all.
    """
    everything = torch.ones(len(embedding), dtype=torch.bool, device=embedding.device)
    keeps = [everything if k is None else k for k in (keep_embedding, keep_caption)]
    with torch.no_grad():
        context = model.condition(embedding, caption, *keeps)
        nothing = model.condition(embedding, caption, ~everything, ~everything)
    predict = classifier_free(
        lambda x, t: model(x, t, context), lambda x, t: model(x, t, nothing), guidance
    )
    config = model.config
    return Denoiser(predict, Schedule(config.schedule, config.times), config.objective)


def sample_latents(
    model: UNet,
    denoise: Denoise,
    candidates: Sequence[int],
    *,
    seed: int = 0,
    steps: int = 20,
    sampler: SamplerName = "dpm-solver",
    eta: float = 0.0,
    repeat: int = 1,
) -> Tensor:
    """Sample latents [repeat · C, c, h, w]; candidate i starts from its own noise.

    Args:
        repeat: number of prompts in the denoiser's batch, each with all candidates.
    """
    config = model.config
    shape, device = (config.channels, config.side, config.side), model.input.weight.device
    noise = CandidateNoise(seed, candidates, shape, "decoder", device)

    def repeated() -> Tensor:
        return noise().repeat(repeat, 1, 1, 1)

    schedule = Schedule(config.schedule, config.times)
    return sample(schedule, denoise, repeated, steps=steps, sampler=sampler, eta=eta)
