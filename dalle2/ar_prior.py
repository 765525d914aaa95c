"""The autoregressive prior (§2.2): a CLIP embedding as a sequence of codes, sampled one by one.

B batch, D width of CLIP embeddings, W² codes of an embedding, V buckets, L text positions.

An embedding is projected on the main axes of the data (PCA), and each projection is put into one of
V buckets. With the bucket of z_i·z_t in front, these are W² codes, which the transformer of
DALL·E 1 models and samples as if they were those of an image:

    caption's tokens · z_i·z_t · first component · second component · …

Sampled embeddings should fit their caption, so the first code is sampled from the upper half of its
distribution. Its buckets rise, and the sampler inverts the cumulative distribution: a random number
from the upper half of [0, 1) does it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.model.arch import TransformerConfig
from dalle1.model.transformer import Transformer
from dalle1.sampling.decoding import candidate_uniforms, generate
from dalle1.sampling.filters import Sampling
from dalle1.storage import load_config, load_weights, model_folder, read_kind, save_weights
from dalle2.conditioning import Caption
from dalle2.prior import FILE_NAME, DiffusionPrior, best_of

KIND = "autoregressive"
RANGE = 4.0
"""Largest value that has a bucket of its own, in standard deviations."""


@dataclass(frozen=True, kw_only=True)
class ARPriorArch:
    """The size of an autoregressive prior."""

    width: int = 256
    """Width of its states. Paper: 1664."""
    depth: int = 4
    """Number of layers. Paper: 24."""
    heads: int = 4
    """Attention heads of each layer. Paper: 26."""
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    """Kind of MLP. Paper: gelu."""
    grid_size: int = 8
    """W: an embedding is W² codes, those of W² − 1 components. Paper: 319 components."""
    buckets: int = 256
    """V: values of a code. Paper: 1024."""
    text_len: int = 32
    """L: text positions; longer captions are cut."""

    def __post_init__(self) -> None:
        for name in ("grid_size", "buckets"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 2")


@dataclass(frozen=True, kw_only=True)
class ARPriorConfig(ARPriorArch):
    """An autoregressive prior between the embeddings of one CLIP."""

    embedding_width: int
    """D: width of the CLIP's embeddings."""
    text_vocab: int
    """Number of tokens of the CLIP's tokenizer."""
    clip: str = ""
    """Digest of the CLIP that it was trained with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid_size**2 > self.embedding_width + 1:
            raise ValueError(
                f"grid_size is {self.grid_size}, which makes {self.grid_size**2 - 1} components, "
                f"expected at most {self.embedding_width}, the width of the CLIP's embeddings"
            )

    @property
    def transformer(self) -> TransformerConfig:
        """Config of the transformer."""
        return TransformerConfig(
            text_vocab=self.text_vocab,
            text_len=self.text_len,
            codebook_size=self.buckets,
            grid_size=self.grid_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp=self.mlp,
            qk_norm=True,
            attention="full",
            positions="flat",
        )


class ARPrior(nn.Module):
    """Codes of embeddings, and the transformer that models them."""

    mean: Tensor
    axes: Tensor
    std: Tensor
    dot: Tensor

    def __init__(self, config: ARPriorConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config.transformer)
        components = config.grid_size**2 - 1
        # What `fit` found in the data.
        self.register_buffer("mean", torch.zeros(config.embedding_width))
        self.register_buffer("axes", torch.zeros(components, config.embedding_width))
        self.register_buffer("std", torch.ones(components))
        self.register_buffer("dot", torch.tensor([0.0, 1.0]))  # mean and std of z_i·z_t

    @torch.no_grad()
    def fit(self, embeddings: Tensor, captions: Tensor) -> None:
        """Find the main axes of z_i [N, D], and the distribution of z_i·z_t, with z_t [N, D]."""
        values = embeddings.double().cpu()
        centred = values - values.mean(0)
        # Eigenvalues rise; the paper's components come in the order of falling ones.
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(values))
        order = torch.arange(len(variances) - 1, len(variances) - 1 - len(self.axes), -1)
        self.mean.copy_(values.mean(0))
        self.axes.copy_(axes.T[order])
        self.std.copy_(variances[order].clamp_min(1e-12).sqrt())
        dots = (embeddings * captions).sum(1)
        self.dot.copy_(torch.stack([dots.mean(), dots.std().clamp_min(1e-6)]))

    def encode(self, embeddings: Tensor, captions: Tensor) -> Tensor:
        """Encode z_i [B, D] as codes [B, W²], with z_t [B, D] for the first."""
        projected = (embeddings - self.mean) @ self.axes.T / self.std
        dots = ((embeddings * captions).sum(1, keepdim=True) - self.dot[0]) / self.dot[1]
        share = (torch.cat([dots, projected], 1) / RANGE + 1) / 2
        return (share * self.config.buckets).long().clamp(0, self.config.buckets - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes [B, W²] to unit vectors [B, D]: the middle of each bucket."""
        share = (codes[:, 1:] + 0.5) / self.config.buckets
        return F.normalize(self.mean + ((2 * share - 1) * RANGE * self.std) @ self.axes, dim=1)

    def tokens(self, caption: Caption) -> Tensor:
        """Return the captions as the transformer reads them, [B, L]; dropped ones are padding."""
        assert caption.ids is not None
        missing = max(self.config.text_len - caption.ids.shape[1], 0)
        ids, mask = (
            F.pad(x, (0, missing))[:, : self.config.text_len] for x in (caption.ids, caption.mask)
        )
        padding = torch.arange(self.config.text_len, device=ids.device) + self.config.text_vocab
        return torch.where(mask, ids, padding)

    @torch.no_grad()
    def sample(
        self,
        caption: Caption,
        candidates: Iterable[int],
        *,
        seed: int = 0,
        steps: int = 0,
        guidance: float = 1.0,
        samples: int | None = None,
    ) -> Tensor:
        """Sample z_i for each caption [P] and candidate [C]: unit vectors [P, C, D].

        Args:
            steps: ignored; there is one for each code.
            samples: see `best_of`. None is 1, as in the paper: the first code has the same purpose.
        """
        chosen, text = list(candidates), self.tokens(caption)

        def sample_one(number: int) -> Tensor:
            own = random.Random(f"{seed}/prior/{number}").getrandbits(32)
            uniforms = candidate_uniforms(own, chosen, self.config.grid_size**2)
            uniforms[:, 0] = (1 + uniforms[:, 0]) / 2
            codes = generate(self.transformer, text, uniforms, Sampling(guidance=guidance))
            return self.decode(codes.flatten(0, 1).flatten(1)).unflatten(0, (-1, len(chosen)))

        return best_of(1 if samples is None else samples, sample_one, caption.embedding)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the parameters and config to `directory`/prior.safetensors."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype, kind=KIND)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> ARPrior:
        """Load what `save` or a training wrote; ValueError where it is missing or damaged."""
        return load_weights(cls, ARPriorConfig, model_folder(directory) / FILE_NAME, device)

    @classmethod
    def config_of(cls, directory: str | Path) -> ARPriorConfig:
        """Read the config of the model that `load` returns."""
        return load_config(cls, ARPriorConfig, model_folder(directory) / FILE_NAME)


Prior = DiffusionPrior | ARPrior


def load_prior(directory: str | Path, device: str | torch.device = "cpu") -> Prior:
    """Load a prior of either kind, which its file names; ValueError where it is missing."""
    path = model_folder(directory) / FILE_NAME
    is_ar = path.is_file() and read_kind(path) == KIND
    return (ARPrior if is_ar else DiffusionPrior).load(directory, device)
