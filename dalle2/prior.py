"""The diffusion prior (§2.2): from a caption to the CLIP embedding of an image that fits it.

B batch, T caption tokens, W width of their states, D width of CLIP embeddings, M width inside.

A decoder-only transformer with a causal mask reads this sequence; the state of the query predicts
z_i itself, whose mean squared error is the loss:

    caption's states · z_t · time · noised z_i · query

It is the layer of the DALL·E transformer. Embeddings are unit vectors; they are multiplied by a
scale at which their entries have the variance of pixels in [−1, 1], as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.model.arch import TransformerConfig
from dalle1.model.transformer import Layer
from dalle1.storage import load_config, load_weights, model_folder, save_weights
from dalle2.blocks import time_embedding
from dalle2.conditioning import Caption
from dalle2.diffusion.guidance import Denoiser, classifier_free
from dalle2.diffusion.noise import CandidateNoise
from dalle2.diffusion.samplers import sample
from dalle2.diffusion.schedule import Schedule, ScheduleName

FILE_NAME = "prior.safetensors"
LAST = 4
"""Positions after the caption: z_t, time, noised z_i, query."""
BINS = 10
"""Equal ranges of times in which errors are measured."""
PIXEL_STD = 17.2 / math.sqrt(1024)
"""Standard deviation of a scaled embedding's entries: the paper scales 1,024 of them by 17.2."""


@dataclass(frozen=True, kw_only=True)
class PriorArch:
    """The size of a diffusion prior."""

    width: int = 256
    """Width of its states, M. Paper: 2048."""
    depth: int = 4
    """Number of layers. Paper: 24."""
    heads: int = 4
    """Attention heads of each layer. Paper: 32."""
    mlp: Literal["gelu", "swiglu", "gelu-erf"] = "swiglu"
    """Kind of MLP. Paper: gelu."""
    qk_norm: bool = True
    """Whether the queries and keys of each head are normalized. Paper: no."""
    schedule: ScheduleName = "cosine"
    """Noise schedule. Paper: cosine."""
    times: int = 1000
    """Number of times in training."""


@dataclass(frozen=True, kw_only=True)
class PriorConfig(PriorArch):
    """A prior between the embeddings of one CLIP."""

    embedding_width: int
    """D: width of the CLIP's embeddings."""
    text_width: int
    """W: width of the states of the CLIP's text tower."""
    clip: str = ""
    """Digest of the CLIP that it was trained with."""
    text_len: int = 0
    """Positions of a caption with learned embeddings; it then also has a mean and a standard
    deviation of each number of z_i, as karlo's. 0: neither."""
    errors: tuple[float, ...] = ()
    """Mean squared errors of predicted entries of scaled z_i in ten equal ranges of times, which
    sampling adds as noise; none: not measured, so steps are those of DDPM."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "errors", tuple(self.errors))  # a file's metadata has lists
        if len(self.errors) not in (0, BINS):
            raise ValueError(f"errors are {len(self.errors)}, expected {BINS} or none")

    @property
    def layer(self) -> TransformerConfig:
        """Config of the layers; its vocabulary and grid are unused."""
        return TransformerConfig(
            text_vocab=1,
            text_len=2,
            codebook_size=1,
            grid_size=1,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp=self.mlp,
            qk_norm=self.qk_norm,
        )


def best_of(samples: int, sample_one: Callable[[int], Tensor], captions: Tensor) -> Tensor:
    """Sample several z_i for each candidate, and keep the one with the highest z_i·z_t.

    Args:
        sample_one: number of the sample → unit vectors [P, C, D].
        captions: z_t [P, D].

    Returns: [P, C, D].
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    z = torch.stack([sample_one(number) for number in range(samples)])
    best = torch.einsum("npcd,pd->npc", z, captions).argmax(0)
    return z.gather(0, best[None, ..., None].expand(1, -1, -1, z.shape[-1]))[0]


class DiffusionPrior(nn.Module):
    """Predicts scaled image embeddings from noised ones and captions."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        m, d = config.width, config.embedding_width
        self.scale = PIXEL_STD * math.sqrt(d)
        self.schedule = Schedule(config.schedule, config.times)
        self.text, self.text_embedding = nn.Linear(config.text_width, m), nn.Linear(d, m)
        self.time = nn.Sequential(nn.Linear(m, m), nn.SiLU(), nn.Linear(m, m))
        self.noised = nn.Linear(d, m)
        self.query = nn.Parameter(0.02 * torch.randn(m))
        self.layers = nn.ModuleList(Layer(config.layer) for _ in range(config.depth))
        self.norm = nn.LayerNorm(m)
        self.head = nn.Linear(m, d)
        if config.text_len:
            self.positions = nn.Parameter(torch.zeros(config.text_len + LAST, m))
            self.register_buffer("mean", torch.zeros(d))
            self.register_buffer("std", torch.full((d,), 1 / self.scale))

    def forward(self, x: Tensor, t: Tensor, caption: Caption) -> Tensor:
        """Predict scaled z_i [B, D] from noised ones x [B, D] at times t [B].

        A dropped caption (`Caption.where`) has no visible token, and z_t = 0.
        """
        time = self.time(time_embedding(t, self.config.width).to(x.dtype))
        z_t = self.text_embedding(caption.embedding * self.scale)
        last = torch.stack([z_t, time, self.noised(x), self.query.expand_as(z_t)], 1)
        states = torch.cat([self.text(caption.states), last], 1)
        if self.config.text_len:
            length = states.shape[1] - LAST
            states = states + torch.cat([self.positions[:length], self.positions[-LAST:]])
        visible = F.pad(caption.mask, (0, last.shape[1]), value=True)
        n = states.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        # A position always sees itself, so that padding has something to attend to.
        mask = (causal & visible[:, None]) | torch.eye(n, dtype=torch.bool, device=x.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])

        for layer in self.layers:
            states = layer(states, attend)
        return self.head(self.norm(states[:, -1]))

    def denoiser(self, caption: Caption, guidance: float = 1.0) -> Denoiser:
        """Return the denoiser under captions [B], guided away from no caption."""
        nothing = torch.zeros(len(caption.mask), dtype=torch.bool, device=caption.mask.device)
        dropped = caption.where(nothing)
        predict = classifier_free(
            lambda x, t: self(x, t, caption), lambda x, t: self(x, t, dropped), guidance
        )
        return Denoiser(predict, self.schedule, "x0")

    def measure(self, t: Tensor, errors: Tensor) -> None:
        """Store the mean squared errors [N] of unguided predictions at times t [N], by ranges.

        A range without a time has the mean of all.
        """
        ranges, found = (t * BINS // self.schedule.times).tolist(), errors.tolist()
        parts = [[e for e, r in zip(found, ranges, strict=True) if r == n] for n in range(BINS)]
        means = tuple(float(np.mean(part or found)) for part in parts)
        self.config = replace(self.config, errors=means)

    def error_at(self, t: int) -> float:
        """Return the mean squared error of a prediction at time t, linear between ranges."""
        if not (errors := self.config.errors):
            return 0.0
        middles = [(n + 0.5) * self.schedule.times / BINS for n in range(BINS)]
        return float(np.interp(t, [0, *middles], [0, *errors]))

    @torch.no_grad()
    def sample(
        self,
        caption: Caption,
        candidates: Iterable[int],
        *,
        seed: int = 0,
        steps: int = 64,
        guidance: float = 1.0,
        samples: int | None = None,
    ) -> Tensor:
        """Sample z_i for each caption [P] and candidate [C]: unit vectors [P, C, D].

        The steps are those of Analytic-DPM (§2.2) by `error_at`.

        Args:
            samples: see `best_of`. None is 2, as in the paper.
        """
        prompts, chosen = len(caption.mask), list(candidates)
        denoise = self.denoiser(caption.repeat(len(chosen)), guidance)
        shape, device = (self.config.embedding_width,), caption.mask.device

        def sample_one(number: int) -> Tensor:
            noise = CandidateNoise(seed, chosen, shape, f"prior/{number}", device)
            x = sample(
                self.schedule,
                denoise,
                lambda: noise().repeat(prompts, 1),
                steps=steps,
                sampler="ancestral",
                error=self.error_at,
            )
            if self.config.text_len:
                x = x * self.std + self.mean
            return F.normalize(x, dim=-1).unflatten(0, (prompts, len(chosen)))

        return best_of(2 if samples is None else samples, sample_one, caption.embedding)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the parameters and config to `directory`/prior.safetensors."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype, kind="diffusion")

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> DiffusionPrior:
        """Load what `save` or a training wrote; ValueError where it is missing or damaged."""
        return load_weights(cls, PriorConfig, model_folder(directory) / FILE_NAME, device)

    @classmethod
    def config_of(cls, directory: str | Path) -> PriorConfig:
        """Read the config of the model that `load` returns."""
        return load_config(cls, PriorConfig, model_folder(directory) / FILE_NAME)
