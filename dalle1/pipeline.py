"""From a prompt to pictures, best first: draw many candidates, let CLIP rank them (paper §2.6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dalle1.clip import Clip
from dalle1.data.cleaning import to_rgb
from dalle1.data.images import centre_square, to_float, to_pil, to_tensor
from dalle1.devices import PRECISIONS, free_memory, out_of_memory, pick_device, pick_precision
from dalle1.image_tokenizer import ImageTokenizer, load_image_tokenizer
from dalle1.model.transformer import Transformer
from dalle1.sampling.decoding import (
    FREE,
    Sampling,
    candidate_uniforms,
    complete_text,
    generate,
    null_caption,
)
from dalle1.sampling.kv_cache import decode_memory
from dalle1.storage import model_folder
from dalle1.text.bpe import Tokenizer

BUNDLED = Path(__file__).parent / "bundled" / "toybox"
VOCABULARY_NAME = "vocab.json"
CLIP_NAME = "clip"
NOTHING = ""
MOST_AT_ONCE = 128
"""Candidates; more gain little."""
Rerank = Literal["clip", "likelihood", "none"]
OnRow = Callable[[Tensor, int], None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One picture drawn for a prompt."""

    image: Image.Image
    codes: Tensor = field(repr=False, compare=False)
    """[W, W]: the codes that it was decoded from."""
    index: int
    """Its place among the candidates as they were drawn; (seed, index) gives it again."""
    seed: int
    score: float | None = None
    """By CLIP: the cosine similarity of picture and prompt. By likelihood: how many bits per code
    the caption saves, log₂ p(picture | caption) − log₂ p(picture). None where nothing ranked it."""
    probability: float | None = None
    """CLIP's bet on it among all that it ranked with it; they sum to 1. None without CLIP."""


class DallE:
    """An image tokenizer, a transformer over its codes, a text tokenizer, and perhaps a CLIP."""

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        transformer: Transformer,
        tokenizer: Tokenizer,
        clip: Clip | None = None,
    ) -> None:
        self.image_tokenizer, self.transformer = image_tokenizer, transformer
        self.tokenizer, self.clip = tokenizer, clip
        config = transformer.config
        codes, grid = image_tokenizer.codebook_size, image_tokenizer.grid_size
        if (codes, grid) != (config.codebook_size, config.grid_size):
            raise ValueError(
                f"the image tokenizer has {codes} codes on a grid of {grid}, the transformer "
                f"expects {config.codebook_size} on {config.grid_size}; use the image tokenizer "
                "that it was trained with"
            )
        if tokenizer.vocab_size != config.text_vocab:
            raise ValueError(
                f"the vocabulary has {tokenizer.vocab_size} tokens, the transformer expects "
                f"{config.text_vocab}; use the vocabulary that it was trained with"
            )

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return self.transformer.image_head.weight.device

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path | None = None,
        *,
        clip: str | Path | None = None,
        device: str = "auto",
        precision: str = "fp32",
    ) -> DallE:
        """Load a folder that `save_pretrained` or train_transformer.py wrote.

        Args:
            directory: None or "bundled" is the model that ships with the project.
            clip: a CLIP's folder or Hugging Face name; "none" for no reranking; None is the
                folder's own, if it has one.
            device: auto is cuda, else mps, else cpu.
            precision: of transformer and CLIP: fp32, bf16, fp16; auto is bf16 where the machine has
                it: faster, but then pictures differ a little from one machine to another.

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
        dtype = pick_precision(precision, place)
        named = next(name for name, kind in PRECISIONS.items() if kind == dtype)
        ranker = None
        if clip is not None and clip != "none":
            ranker = Clip.from_pretrained(clip, place, named)
        return cls(
            load_image_tokenizer(folder, place),
            Transformer.load(folder, place).to(dtype),
            Tokenizer.load(folder / VOCABULARY_NAME),
            ranker,
        )

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write all parts to `directory`, weights rounded to `dtype`."""
        folder = Path(directory)
        self.image_tokenizer.save(folder, dtype)
        self.transformer.save(folder, dtype)
        self.tokenizer.save(folder / VOCABULARY_NAME)
        if self.clip is not None:
            self.clip.save_pretrained(folder / CLIP_NAME, dtype)

    def candidates(self, prompt: str, **options: Any) -> list[Candidate]:
        """Draw pictures for one prompt, best first; the options are those of `draw`."""
        return next(self.draw([prompt], **options))

    def draw(
        self,
        prompts: Sequence[str],
        *,
        num_candidates: int = 16,
        seed: int = 0,
        given: Tensor | None = None,
        rerank: Rerank | None = None,
        batch_size: int | None = None,
        share: tuple[int, int] = (0, 1),
        on_row: OnRow | None = None,
        **sampling: Any,
    ) -> Iterator[list[Candidate]]:
        """Yield for each prompt, in their order, its pictures, best first.

        Args:
            num_candidates: how many for each; candidate i depends on the seed and i alone.
            given: codes that are given; see `encode_known`.
            rerank: what orders them: clip, likelihood, or none for the order of drawing. By
                default clip, if there is one.
            batch_size: how many are drawn at once; None is as many as fit in memory.
            share: (r, n) draws candidates r, r + n, r + 2n … only: the part of one of n processes.
            on_row: called after each row of codes of each batch with the codes, [B, N], and how
                many of their rows are there.
            sampling: the fields of `dalle1.sampling.decoding.Sampling`.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts is {prompts!r}, expected a list of at least one")
        if not 0 <= share[0] < share[1]:
            raise ValueError(f"share is {share}, expected (r, n) with r from 0 to n − 1")
        how = Sampling(**sampling)
        rerank = self._check_rerank(rerank)
        if num_candidates < 1:
            raise ValueError(f"num_candidates is {num_candidates}, expected at least 1")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        fits = room(self.transformer, batch_size, guided=how.guidance != 1, processes=share[1])
        text = self._encode_prompts(prompts)
        own = range(num_candidates)[share[0] :: share[1]]
        if not own:
            yield from ([] for _ in prompts)
            return

        def batch(rows: range, columns: range) -> Tensor:
            uniforms = candidate_uniforms(seed, columns, self.transformer.config.image_len)
            each = on_row and (lambda codes, done: on_row(codes.flatten(0, 1), done))
            which = text[rows.start : rows.stop]
            return generate(self.transformer, which, uniforms, how, given=given, on_row=each)

        drawn: list[Candidate] = []
        for rows, columns, codes in in_batches(batch, range(len(prompts)), own, fits):
            for row, of_prompt in zip(rows, codes, strict=True):
                images = self.decode(of_prompt)
                drawn += [
                    Candidate(image=image, codes=code.cpu().clone(), index=i, seed=seed)
                    for i, image, code in zip(columns, images, of_prompt, strict=True)
                ]
                if len(drawn) == len(own):
                    yield self.rank(prompts[row], drawn, rerank)
                    drawn = []

    @torch.inference_mode()
    def decode(self, codes: Tensor, batch_size: int = 16) -> list[Image.Image]:
        """Turn codes [B, W, W] into pictures, so many at a time."""
        parts = codes.split(batch_size)
        return [x for part in parts for x in to_pil(self.image_tokenizer.decode(part))]

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> Tensor:
        """Turn a picture into codes [W, W]; what is not square is cut to its middle."""
        square = centre_square(to_rgb(image), self.image_tokenizer.image_size, allow_upscale=True)
        pixels = to_float(to_tensor(square)[None])
        return self.image_tokenizer.encode(pixels.to(self.device))[0]

    def encode_known(
        self, image: Image.Image, *, keep_rows: int | None = None, mask: Image.Image | None = None
    ) -> Tensor:
        """Give the codes of `image` that stay, [N]: the rest is free, to be drawn anew.

        Args:
            keep_rows: how many of the W rows of codes stay, from the top (paper, figure 2c: 15 of
                32).
            mask: instead of it, a picture of the same shape, white where that is drawn anew. A
                code is free as soon as any of its pixels is.
        """
        if (keep_rows is None) == (mask is None):
            raise ValueError("expected either keep_rows or a mask, to say what stays")
        codes, width = self.encode(image).clone(), self.image_tokenizer.grid_size
        if keep_rows is not None:
            if not 0 <= keep_rows < width:
                raise ValueError(f"keep_rows is {keep_rows}, expected 0 to {width - 1}")
            codes[keep_rows:] = FREE
            return codes.flatten()
        assert mask is not None
        mask, image = ImageOps.exif_transpose(mask), to_rgb(image)
        if mask.size != image.size:
            raise ValueError(
                f"the mask has {mask.width} × {mask.height} pixels, the picture "
                f"{image.width} × {image.height}; expected the same"
            )
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask).convert("RGB")
        side = min(mask.size)
        left, top = ((length - side) // 2 for length in mask.size)
        grey = to_float(to_tensor(mask.crop((left, top, left + side, top + side)))).mean(0)
        free = F.adaptive_max_pool2d(grey[None], width)[0] >= 0.5
        if not free.any():
            raise ValueError("the mask is black throughout; paint white what is to be drawn anew")
        return codes.masked_fill(free.to(codes.device), FREE).flatten()

    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Give the tokens of all, [B, L]. Says once of each which of its words are unknown."""
        for prompt in dict.fromkeys(prompts):
            if self.tokenizer.words and (complaint := self.tokenizer.words.complaint(prompt)):
                warnings.warn(complaint, stacklevel=3)
        return torch.stack([self.encode_prompt(prompt) for prompt in prompts])

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
        return tokens.to(self.device)

    def _check_rerank(self, rerank: Rerank | None) -> Rerank:
        if rerank is None:
            return "clip" if self.clip is not None else "none"
        if rerank not in get_args(Rerank):
            raise ValueError(f"rerank is {rerank!r}, expected {' or '.join(get_args(Rerank))}")
        if rerank == "clip" and self.clip is None:
            raise ValueError("there is no CLIP to rerank with; name one, or rerank by likelihood")
        return rerank

    def rank(
        self, prompt: str, candidates: list[Candidate], by: Rerank | None = None
    ) -> list[Candidate]:
        """Score candidates and sort them, best first; see `draw`."""
        by = self._check_rerank(by)
        if by == "none" or not candidates:
            return candidates
        if by == "clip" and self.clip is not None:
            scores = self.clip.score(prompt, [c.image for c in candidates])
        else:
            codes = torch.stack([c.codes for c in candidates])
            scores = self.bits(NOTHING, codes)[1] - self.bits(prompt, codes)[1]
        scored = [replace(c, score=s) for c, s in zip(candidates, scores.tolist(), strict=True)]
        scored = self.with_probabilities(scored) if by == "clip" else scored
        return sorted(scored, key=lambda c: (-(c.score or 0.0), c.index))

    def with_probabilities(self, candidates: list[Candidate]) -> list[Candidate]:
        """Say of candidates that CLIP has scored how it would bet among them."""
        if self.clip is None:
            return candidates
        bets = self.clip.probabilities(torch.tensor([c.score for c in candidates])).tolist()
        return [replace(c, probability=bet) for c, bet in zip(candidates, bets, strict=True)]

    @torch.inference_mode()
    def bits(self, prompt: str, codes: Tensor, batch_size: int = 8) -> tuple[float, Tensor]:
        """Give −log₂ p of `prompt`, and of each of the pictures given it: a token and a code.

        Args:
            codes: [B, W, W].

        Returns: bits per text token, its end counted and its padding not; bits per code, [B].
        """
        text = self.encode_prompt(prompt) if prompt else null_caption(self.transformer)[0]
        text, of_text, of_codes = text.to(self.device), 0.0, []
        for part in codes.to(self.device).split(batch_size):
            text_losses, image_losses = self.transformer.losses(text.expand(len(part), -1), part)
            tokens = int((text < self.transformer.config.text_vocab).sum())
            counted = tokens + self.transformer.config.pad_targets
            of_text = float(text_losses[0, :counted].sum()) / max(counted, 1) / math.log(2)
            of_codes.append(image_losses.mean(1) / math.log(2))
        return of_text, torch.cat(of_codes)

    def log_likelihood(self, prompt: str, image: Image.Image) -> tuple[float, float]:
        """Give bits per text token of `prompt`, and bits per code of `image` given it.

        Fewer bits are likelier. The picture is encoded by the dVAE first; an empty prompt is no
        caption.
        """
        text, codes = self.bits(prompt, self.encode(image)[None])
        return text, float(codes)

    def complete(
        self, beginning: str, *, count: int = 4, seed: int = 0, **sampling: Any
    ) -> list[str]:
        """Continue the beginning of a caption in `count` ways, as the model's captions go on."""
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1")
        text = self.encode_prompt(beginning)
        uniforms = candidate_uniforms(seed, range(count), len(text))
        return self.tokenizer.decode(
            complete_text(self.transformer, text, uniforms, Sampling(**sampling))
        )

    def generate(
        self, prompt: str, *, num_images: int = 4, num_candidates: int = 16, **options: Any
    ) -> list[Image.Image]:
        """Give the best `num_images` of `num_candidates` pictures, best first.

        Args:
            options: `seed`, `temperature`, `top_k` …; see `draw`.
        """
        if not 1 <= num_images <= num_candidates:
            raise ValueError(
                f"num_images is {num_images}, expected 1 to num_candidates, {num_candidates}"
            )
        drawn = self.candidates(prompt, num_candidates=num_candidates, **options)
        return [c.image for c in drawn[:num_images]]


Fits = Callable[[int, int], bool]
"""(prompts, candidates of each) → whether they can be drawn at once."""


def room(
    model: Transformer, batch_size: int | None, *, guided: bool = False, processes: int = 1
) -> Fits:
    """Give what says how much can be drawn at once: `batch_size` candidates, or what fits.

    What fits is at most 128 candidates in half of the memory that is free now; on a CPU, in this
    process's share of it.
    """
    if batch_size is not None:
        return lambda prompts, candidates: prompts * candidates <= batch_size
    device = next(model.parameters()).device
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    of_prompt, of_candidate = (n * (2 if guided else 1) for n in decode_memory(model))

    def fits(prompts: int, candidates: int) -> bool:
        needed = prompts * (of_prompt + candidates * of_candidate)
        return prompts * candidates <= MOST_AT_ONCE and needed <= free / 2

    return fits


def in_batches(
    draw: Callable[[range, range], Tensor], rows: range, columns: range, fits: Fits
) -> Iterator[tuple[range, range, Tensor]]:
    """Draw all of rows × columns, prompts and candidates, in rectangles that fit.

    Where memory runs out nevertheless, half as many are drawn at once from there on.
    """
    waiting, most = [(rows, columns)], math.inf
    while waiting:
        rows, columns = waiting.pop()
        count = len(rows) * len(columns)
        if count == 1 or (count <= most and fits(len(rows), len(columns))):
            try:
                codes = draw(rows, columns)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or count == 1:
                    raise
                most = count // 2
                warnings.warn(f"out of memory; going on with {most} at once", stacklevel=2)
            else:
                yield rows, columns, codes
                continue
        if len(rows) > 1:
            half = len(rows) // 2
            waiting += [(rows[half:], columns), (rows[:half], columns)]
        else:
            half = len(columns) // 2
            waiting += [(rows, columns[half:]), (rows, columns[:half])]
