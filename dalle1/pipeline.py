"""From a prompt to pictures, best first: draw many candidates, let CLIP rank them (paper §2.6)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from dalle1.clip import Clip
from dalle1.data.images import to_pil
from dalle1.device import pick_device
from dalle1.sampler import candidate_uniforms, check_settings, generate
from dalle1.text import Tokenizer
from dalle1.transformer import Transformer
from dvae import DVAE
from dvae.weights import model_folder

BUNDLED = Path(__file__).parent / "bundled"
VOCABULARY_NAME = "vocab.json"
CLIP_NAME = "clip"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One picture drawn for a prompt."""

    image: Image.Image
    index: int
    """Its place among the candidates as they were drawn; (seed, index) gives it again."""
    seed: int
    score: float | None = None
    """Cosine similarity of picture and prompt in CLIP's eyes; None where there is no CLIP."""
    probability: float | None = None
    """CLIP's bet on it among all that were drawn with it; they sum to 1."""


class DallE:
    """A dVAE, a transformer over its codes, the vocabulary of its text, and perhaps a CLIP."""

    def __init__(
        self, dvae: DVAE, transformer: Transformer, tokenizer: Tokenizer, clip: Clip | None = None
    ) -> None:
        self.dvae, self.transformer, self.tokenizer, self.clip = dvae, transformer, tokenizer, clip
        config = transformer.config
        if (dvae.vocab_size, dvae.grid_size) != (config.codebook_size, config.grid_size):
            raise ValueError(
                f"the dVAE has {dvae.vocab_size} codes on a grid of {dvae.grid_size}, the "
                f"transformer expects {config.codebook_size} on {config.grid_size}; use the dVAE "
                "that it was trained with"
            )
        if tokenizer.vocab_size != config.text_vocab:
            raise ValueError(
                f"the vocabulary has {tokenizer.vocab_size} tokens, the transformer expects "
                f"{config.text_vocab}; use the vocabulary that it was trained with"
            )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path | None = None,
        *,
        clip: str | Path | None = None,
        device: str = "auto",
    ) -> DallE:
        """Load a folder that `save_pretrained` or train_transformer.py wrote.

        Args:
            directory: None or "bundled" is the model that ships with the project.
            clip: a CLIP's folder or Hugging Face name; "none" for no reranking; None is the
                folder's own, if it has one.
            device: auto is cuda, else mps, else cpu.

        Raises: ValueError where something is missing, damaged or does not fit the rest.
        """
        if directory is None or directory == "bundled":
            directory = BUNDLED
        folder = model_folder(directory)
        if not folder.is_dir():
            raise ValueError(f"no model at {directory}: there is no such folder")
        if clip is None and (folder / CLIP_NAME).is_dir():
            clip = folder / CLIP_NAME
        place = pick_device(device)
        ranker = None if clip is None or clip == "none" else Clip.from_pretrained(clip, place)
        return cls(
            DVAE.load(folder, place),
            Transformer.load(folder, place),
            Tokenizer.load(folder / VOCABULARY_NAME),
            ranker,
        )

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write all parts to `directory`, weights rounded to `dtype`."""
        folder = Path(directory)
        self.dvae.save(folder, dtype)
        self.transformer.save(folder, dtype)
        self.tokenizer.save(folder / VOCABULARY_NAME)
        if self.clip is not None:
            self.clip.save_pretrained(folder / CLIP_NAME, dtype)

    def candidates(
        self,
        prompt: str,
        *,
        num_candidates: int = 16,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int = 64,
        on_row: Callable[[int], None] | None = None,
    ) -> list[Candidate]:
        """Draw pictures for `prompt`, best first; in the order of drawing without a CLIP.

        Args:
            num_candidates: how many; candidate i depends on the seed and i alone.
            temperature, top_k, top_p: see `dalle1.sampler`; the paper's are 1, 0 and 1.
            batch_size: how many are drawn at once.
            on_row: called after each row of codes of each batch, with how many codes it drew.
        """
        if num_candidates < 1:
            raise ValueError(f"num_candidates is {num_candidates}, expected at least 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        check_settings(temperature, top_k, top_p)
        text = self.encode_prompt(prompt)
        images: list[Image.Image] = []
        width = self.dvae.grid_size
        for start in range(0, num_candidates, batch_size):
            batch = range(start, min(start + batch_size, num_candidates))
            codes = generate(
                self.transformer,
                text,
                candidate_uniforms(seed, batch, width**2),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                on_row=on_row and partial(_count_row, on_row, len(batch) * width),
            )
            images += to_pil(self.dvae.decode(codes))
        drawn = [Candidate(image=x, index=i, seed=seed) for i, x in enumerate(images)]
        return self.rank(prompt, drawn)

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """Give the tokens of `prompt` with their padding: [L]. Says so where it must cut it."""
        if not prompt.strip():
            raise ValueError("the prompt is empty; say what to draw, such as: an avocado armchair")
        length = self.transformer.config.text_len
        tokens = self.tokenizer.encode([prompt], length)[0]
        if (count := self.tokenizer.count(prompt)) > length - 1:
            kept = self.tokenizer.decode(tokens[None])[0]
            warnings.warn(
                f"the prompt has {count} tokens and this model reads {length - 1}; it is cut to: "
                f"{kept}",
                stacklevel=2,
            )
        return tokens.to(next(self.transformer.parameters()).device)

    def rank(self, prompt: str, candidates: list[Candidate]) -> list[Candidate]:
        """Score candidates by CLIP and sort them, best first; leave them as they are without."""
        if self.clip is None:
            return candidates
        scores = self.clip.score(prompt, [c.image for c in candidates])
        pairs = zip(scores.tolist(), self.clip.probabilities(scores).tolist(), strict=True)
        scored = [
            replace(c, score=score, probability=probability)
            for c, (score, probability) in zip(candidates, pairs, strict=True)
        ]
        return sorted(scored, key=lambda c: (-(c.score or 0.0), c.index))

    def generate(
        self, prompt: str, *, num_images: int = 4, num_candidates: int = 16, **options: object
    ) -> list[Image.Image]:
        """Give the best `num_images` of `num_candidates` pictures, best first.

        Args:
            options: `seed`, `temperature`, `top_k`, `top_p`, `batch_size`; see `candidates`.
        """
        if not 1 <= num_images <= num_candidates:
            raise ValueError(
                f"num_images is {num_images}, expected 1 to num_candidates, {num_candidates}"
            )
        drawn = self.candidates(prompt, num_candidates=num_candidates, **options)  # type: ignore[arg-type]
        return [c.image for c in drawn[:num_images]]


def _count_row(on_row: Callable[[int], None], codes: int, _: int) -> None:
    on_row(codes)
