"""The codebook of a VQ-VAE in training: moving averages, and restarts of unused codes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class CodebookAverage(nn.Module):
    """Moving averages of the features of each code (VQ-VAE, appendix A.1).

    N_i ← γ N_i + (1 − γ) n_i,  m_i ← γ m_i + (1 − γ) Σ_j z_ij,  e_i ← m_i / N_i.

    A code whose N_i falls below a share of the mean restarts at a random feature of the batch
    (Dhariwal et al. 2020, Jukebox, §3.3). At the first update that holds for all codes, which
    initializes the codebook from data.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, size: int, width: int, decay: float, restart_below: float) -> None:
        super().__init__()
        self.decay, self.restart_below = decay, restart_below
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, width))

    @torch.no_grad()
    def update(
        self, codebook: Tensor, features: Tensor, codes: Tensor, rng: torch.Generator
    ) -> Tensor:
        """Update the averages and the codebook in place, alike in all processes.

        Args:
            codebook: the code vectors, [V, E].
            features: the encoder's output, [B, E, h, w].
            codes: the code of each feature, [B, h, w].
            rng: source of the features that codes restart at; that of the main process counts.

        Returns: the number of codes that restarted, a scalar.
        """
        vectors = rearrange(features, "b e h w -> (b h w) e").float()
        one_hot = F.one_hot(codes.flatten(), len(codebook)).to(vectors.dtype)
        with torch.autocast(vectors.device.type, enabled=False):  # the averages are fp32
            counts, sums = one_hot.sum(0), one_hot.T @ vectors
        chosen = torch.randint(len(vectors), (len(codebook),), generator=rng, device=rng.device)
        candidates = vectors[chosen]
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(candidates, 0)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        mean = self.counts.mean()
        unused = self.counts <= self.restart_below * mean
        self.counts[unused] = mean
        self.sums[unused] = candidates[unused] * mean
        codebook.copy_(self.sums / self.counts[:, None])
        return unused.sum()
