"""How a DALL·E 2 samples: options of prior, decoder and upsampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle1.config import check_types
from dalle2.diffusion.samplers import SamplerName

EmbeddingName = Literal["prior", "caption", "none"]


@dataclass(frozen=True, kw_only=True)
class UnclipOptions:
    """How prior and decoder sample; which embedding the decoder is told."""

    steps: int = 20
    """Steps of the decoder. Paper: 250, ancestral."""
    sampler: SamplerName = "dpm-solver"
    """Sampler of the decoder: dpm-solver, ddim or ancestral."""
    eta: float = 0.0
    """Noise that ddim adds, from 0 to 1."""
    clip_guidance: float = 0.0
    """Weight of CLIP's gradient in each step of the decoder; 0 turns it off, 1 is CLIP's own."""
    embedding: EmbeddingName = "prior"
    """Embedding that the decoder is told: the prior's, the caption's own z_t, or none, as GLIDE."""
    prior_steps: int = 64
    """Steps of a diffusion prior. Paper: 64."""
    prior_samples: int | None = None
    """Embeddings that the prior samples for each candidate; the one nearest to z_t is kept. None:
    2 of a diffusion prior, 1 of an autoregressive one, as in the paper."""
    prior_guidance: float = 1.0
    """Guidance scale of the prior. Paper: guiding it makes results worse."""
    upsampler_steps: int = 4
    """Steps of the upsampler, by DDIM; 0 skips it. Paper: 27."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "prior_steps", "prior_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.upsampler_steps < 0:
            raise ValueError(f"upsampler_steps is {self.upsampler_steps}, expected at least 0")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}, expected a number in [0, 1]")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is {self.eta}, expected 0 with the sampler {self.sampler}")
