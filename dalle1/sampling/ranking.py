"""What all models that sample images share: candidates of a prompt, ranked, best first."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from dalle1.clip import Clip
from dalle1.config import image_counts
from dalle1.data.cleaning import clean_prompt
from dalle1.hub import upload
from dalle1.model_card import ModelInfo, model_card
from dalle1.sampling.generation import GenerationConfig, Rerank
from dalle1.sampling.reranking import Candidate, ClipReranker, Reranker, ranked


class RankingPipeline(ABC):
    """A model that samples candidates for prompts, such as `DallE`."""

    clip: Clip | None
    generation: GenerationConfig
    info: ModelInfo
    image_tokenizer: Any

    @abstractmethod
    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write all parts to `directory`, weights rounded to `dtype`."""

    @abstractmethod
    def sample(self, prompts: Sequence[str], **options: Any) -> Iterator[list[Candidate]]:
        """Sample images for each prompt, best first."""

    @abstractmethod
    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Decode what was sampled, [C, …], to images."""

    def finished(
        self, candidates: list[Candidate], upsampler_steps: int | None = None
    ) -> list[Candidate]:
        """Return the candidates that are kept as they are shown: by default, unchanged.

        Args:
            upsampler_steps: steps of a DALL·E 2's upsampler, 0 for none; None is its own number.
        """
        return candidates

    def likelihood(self) -> Reranker:
        """Return the reranker by likelihood; ValueError for a model that computes none."""
        raise ValueError("rerank is 'likelihood', expected clip or none: this model computes none")

    def push_to_hub(
        self, repo: str, *, dtype: torch.dtype | None = None, private: bool | None = None
    ) -> str:
        """Upload all parts and a model card to user/name on Hugging Face; return the address.

        Args:
            dtype: data type of the uploaded parameters; None keeps their own.
            private: see `dalle1.hub.upload`.
        """
        card = model_card(repo, self.info, self.image_tokenizer.image_size, bool(self.clip))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            return upload(Path(folder), repo, card, private)

    def candidates(self, prompt: str, **options: Any) -> list[Candidate]:
        """Sample images for one prompt, best first; the options are those of `sample`."""
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {prompt!r}, expected one text; sample takes a list")
        return next(self.sample([prompt], **options))

    def _ranked(
        self,
        batches: Iterable[tuple[range, range, Tensor]],
        prompts: Sequence[str],
        seed: int,
        reranker: Reranker | None,
        count: int,
    ) -> Iterator[list[Candidate]]:
        """Yield the candidates of each prompt, ranked, as soon as all `count` are sampled."""
        candidates: list[Candidate] = []
        for rows, columns, codes in batches:
            for row, grids in zip(rows, codes, strict=True):
                candidates += self._candidates(grids, columns, seed)
                if len(candidates) == count:
                    yield ranked(reranker, prompts[row], candidates)
                    candidates = []

    def _candidates(self, codes: Tensor, indices: range, seed: int) -> list[Candidate]:
        """Decode what was sampled, [C, …], of the candidates at `indices`."""
        return [
            Candidate(image=image, codes=grid.cpu().clone(), index=i, seed=seed)
            for i, image, grid in zip(indices, self.decode(codes), codes, strict=True)
        ]

    def reranker(self, rerank: Rerank | None = None) -> Reranker | None:
        """Return the reranker of that name; None for "none", and without a name and a CLIP.

        Raises: ValueError for another name, or if the model has no CLIP.
        """
        if rerank is None:
            return None if self.clip is None else ClipReranker(self.clip)
        if rerank not in get_args(Rerank):
            raise ValueError(f"rerank is {rerank!r}, expected {' or '.join(get_args(Rerank))}")
        if rerank == "none":
            return None
        if rerank == "likelihood":
            return self.likelihood()
        if self.clip is None:
            raise ValueError("this model has no CLIP to rerank with; name one, or use likelihood")
        return ClipReranker(self.clip)

    def rank(
        self, prompt: str, candidates: list[Candidate], by: Rerank | None = None
    ) -> list[Candidate]:
        """Score candidates and sort them, best first; see `sample`."""
        return ranked(self.reranker(by), clean_prompt(prompt), candidates)

    def with_probabilities(self, candidates: list[Candidate]) -> list[Candidate]:
        """Add CLIP's softmax over the scores of all these candidates; nothing without a CLIP."""
        return candidates if self.clip is None else ClipReranker(self.clip).finish(candidates)

    def generate(
        self,
        prompt: str,
        *,
        num_images: int | None = None,
        num_candidates: int | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Sample `num_candidates` images and return the best `num_images`, best first.

        Args:
            num_images: by default 4, or all of fewer candidates.
            num_candidates: by default the model's own number, or num_images if that is more.
            options: `seed`, `temperature`, `top_k` …; see `sample`.
        """
        num_images, num_candidates = image_counts(
            num_images, num_candidates, self.generation.num_candidates
        )
        best = self.candidates(prompt, num_candidates=num_candidates, **options)[:num_images]
        return [c.image for c in self.finished(best, options.get("upsampler_steps"))]
