"""Rerankers: they score the candidates of a prompt, so that the best come first (paper §2.6).

C candidates, W × W grid of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from dalle1.clip import Clip

NO_CAPTION = ""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One image sampled for a prompt."""

    image: Image.Image
    codes: Tensor = field(repr=False, compare=False)
    """[W, W]: the codes that the image was decoded from; or a diffusion model's latents."""
    index: int
    """Number of the candidate in the order of sampling; (seed, index) reproduces it."""
    seed: int
    score: float | None = None
    """Score of the reranker, see `ClipReranker` and `LikelihoodReranker`; None without one."""
    probability: float | None = None
    """CLIP's softmax over all candidates of the prompt; None without CLIP."""


class Reranker(Protocol):
    """Scores of the candidates of a prompt: a higher score is a better match."""

    def scores(self, prompt: str, candidates: Sequence[Candidate]) -> Tensor:
        """Score each candidate: [C]."""

    def finish(self, candidates: list[Candidate]) -> list[Candidate]:
        """Add what depends on the scores of all candidates."""


@dataclass(frozen=True)
class ClipReranker:
    """Cosine similarity of image and prompt, and its softmax as a probability (paper §2.6)."""

    clip: Clip

    def scores(self, prompt: str, candidates: Sequence[Candidate]) -> Tensor:
        return self.clip.score(prompt, [c.image for c in candidates])

    def finish(self, candidates: list[Candidate]) -> list[Candidate]:
        scores = torch.tensor([c.score for c in candidates])
        probabilities = self.clip.probabilities(scores).tolist()
        return [replace(c, probability=p) for c, p in zip(candidates, probabilities, strict=True)]


@dataclass(frozen=True)
class LikelihoodReranker:
    """Bits per code that the prompt saves: log₂ p(image | prompt) − log₂ p(image)."""

    bits: Callable[[str, Tensor], tuple[float, Tensor]]
    """(prompt, codes) → bits per text token, bits per code [C]; see `DallE.bits`."""

    def scores(self, prompt: str, candidates: Sequence[Candidate]) -> Tensor:
        codes = torch.stack([c.codes for c in candidates])
        return self.bits(NO_CAPTION, codes)[1] - self.bits(prompt, codes)[1]

    def finish(self, candidates: list[Candidate]) -> list[Candidate]:
        return candidates


def ranked(reranker: Reranker | None, prompt: str, candidates: list[Candidate]) -> list[Candidate]:
    """Score candidates and sort them, best first; without a reranker, keep their order."""
    if reranker is None or not candidates:
        return candidates
    scores = reranker.scores(prompt, candidates).tolist()
    scored = reranker.finish([replace(c, score=s) for c, s in zip(candidates, scores, strict=True)])
    return sorted(scored, key=lambda c: (-(c.score or 0.0), c.index))
