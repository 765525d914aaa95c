"""Sample latents from a decoder: its denoiser under a condition, and candidates' own noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dalle2.conditioning import Caption
from dalle2.diffusion.guidance import Denoise, Denoiser, Predict, classifier_free
from dalle2.diffusion.noise import CandidateNoise
from dalle2.diffusion.samplers import SamplerName, sample
from dalle2.diffusion.schedule import Schedule
from dalle2.unet import UNet, UNetConfig


def unet_denoiser(config: UNetConfig, predict: Predict) -> Denoiser:
    """Return the denoiser of a U-Net's prediction; x₀ of pixels is clipped to [−1, 1].

    Without clipping, a prediction of ε would diverge at the first step: it is divided by the signal
    that is left at the noisiest time, 1/20,000.
    """
    return Denoiser(
        predict,
        Schedule(config.schedule, config.times),
        config.objective,
        clip=(lambda x0: x0.clamp(-1, 1)) if config.pixels else None,
        learns_variance=config.learns_variance,
    )


def decoder_denoiser(
    model: UNet,
    embedding: Tensor,
    caption: Caption,
    *,
    guidance: float = 1.0,
    keep_embedding: Tensor | None = None,
    keep_caption: Tensor | None = None,
    negative: Caption | None = None,
    contrasts: Sequence[tuple[Caption, Tensor]] = (),
) -> Denoiser:
    """Return the decoder's denoiser under z_i [B, D] and captions, guided away from neither.

    Args:
        keep_embedding, keep_caption: bool [B]; None keeps all.
        negative: captions that guidance leads away from, rather than from no caption.
        contrasts: captions without some words, with w − 1 [B] for these words' weight w.
    """
    everything = torch.ones(len(embedding), dtype=torch.bool, device=embedding.device)
    keeps = [everything if k is None else k for k in (keep_embedding, keep_caption)]
    with torch.no_grad():
        context = model.condition(embedding, caption, *keeps)
        keep_negative = everything if negative is not None else ~everything
        nothing = model.condition(embedding, negative or caption, ~everything, keep_negative)
        others = [model.condition(embedding, other, *keeps) for other, _ in contrasts]
    predict = classifier_free(
        partial(model, context=context),
        partial(model, context=nothing),
        guidance,
        channels=model.config.channels,
        contrasts=[
            (partial(model, context=other), strength.to(embedding).view(-1, 1, 1, 1))
            for other, (_, strength) in zip(others, contrasts, strict=True)
        ],
    )
    return unet_denoiser(model.config, predict)


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
