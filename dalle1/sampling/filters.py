"""Options of sampling, and the filters that remove unlikely tokens before a token is sampled.

B rows, V tokens.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle1.config import check_types

MIN_TEMPERATURE = 1e-20
"""Temperature below which the likeliest token is taken: float32 cannot divide by less."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are sampled from logits. The paper samples from the unchanged distribution."""

    temperature: float = 1.0
    """Divisor of the logits: below 1 less varied, above 1 more varied; 0 is the likeliest token."""
    top_k: int = 0
    """Number of likeliest tokens to sample from, ties with the last included; 0 is all."""
    top_p: float = 1.0
    """Nucleus sampling: probability of the likeliest tokens to sample from, in (0, 1]."""
    typical: float = 1.0
    """Typical sampling: total probability of the most typical tokens to sample from, in (0, 1]."""
    guidance: float = 1.0
    """Classifier-free guidance w: logits are u + w·(c − u), u without and c with the caption. 1
    turns it off."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}, expected at least 0 (0: the likeliest)"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected at least 0 (0: all)")
        for name in ("top_p", "typical"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected above 0 and at most 1 (1: all)"
                )
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}, expected at least 0 (1: none)")

    @property
    def is_deterministic(self) -> bool:
        """Whether all candidates of a prompt are alike."""
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    def distinct(self, candidates: int) -> int:
        """Return how many of the candidates differ, with a warning where that is one."""
        if not self.is_deterministic or candidates == 1:
            return candidates
        warnings.warn(f"all {candidates} candidates are alike; one is sampled", stacklevel=3)
        return 1


PAPER = Sampling()


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set removed tokens of logits [B, V] to −∞: by top_k first, then typical, then top_p.

    The likeliest token, or the most typical one, always stays.
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = top_k(logits, sampling.top_k)
    if sampling.typical < 1:
        logits = typical(logits, sampling.typical)
    if sampling.top_p < 1:
        logits = keep_share(logits, logits, sampling.top_p)
    return logits


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens, and those that tie with the last of them."""
    least = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def typical(logits: Tensor, share: float) -> Tensor:
    """Keep the tokens whose −log p is closest to the entropy (arXiv 2202.00666)."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1, True)
    return keep_share(logits, -(log_p + entropy).abs(), share)


def keep_share(logits: Tensor, preference: Tensor, share: float) -> Tensor:
    """Keep the most preferred tokens until their probabilities sum to `share`."""
    order = preference.sort(descending=True, stable=True).indices
    p = logits.gather(-1, order).softmax(-1)
    removed = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= share)
    return logits.masked_fill(removed, -torch.inf)
