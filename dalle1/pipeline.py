"""From a prompt to images, best first: sample many candidates, rerank them by CLIP (paper §2.6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle1.clip import Clip, load_scoring_clip
from dalle1.data.cleaning import clean_prompt
from dalle1.data.crops import centre_square
from dalle1.data.images import codes_to_sample, read_image_file, to_float, to_pil, to_rgb, to_tensor
from dalle1.devices import PRECISIONS, inference, pick_device, pick_precision
from dalle1.hub import find_model
from dalle1.image_tokenizer import ImageTokenizer, load_image_tokenizer, replaced_image_tokenizer
from dalle1.model.transformer import Transformer
from dalle1.model_card import ModelInfo
from dalle1.sampling.batching import batched, check_counts, max_batch
from dalle1.sampling.captions import complete_text
from dalle1.sampling.decoding import (
    UNKNOWN,
    candidate_uniforms,
    check_known,
    generate,
)
from dalle1.sampling.filters import Sampling
from dalle1.sampling.generation import GenerationConfig
from dalle1.sampling.guidance import Contrasts, check_negative_prompt, num_captions
from dalle1.sampling.packed_linear import intact
from dalle1.sampling.ranking import RankingPipeline
from dalle1.sampling.reranking import Candidate, LikelihoodReranker, Reranker
from dalle1.sampling.resampling import (
    ClipRowScore,
    LikelihoodRowScore,
    Resampler,
    RowScore,
    sampled_whole,
)
from dalle1.storage import BUNDLED, CLIP_NAME, refuse_other_clip, refuse_other_model
from dalle1.text.bpe import Tokenizer
from dalle1.text.prompt_weights import WeightedPrompts

VOCABULARY_NAME = "vocab.json"
OnRow = Callable[[Tensor, int], None]


class DallE(RankingPipeline):
    """An image tokenizer, a transformer over its codes, a text tokenizer, and perhaps a CLIP."""

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        transformer: Transformer,
        tokenizer: Tokenizer,
        clip: Clip | None = None,
        info: ModelInfo | None = None,
        generation: GenerationConfig | None = None,
    ) -> None:
        self.image_tokenizer, self.transformer = image_tokenizer, transformer
        self.tokenizer, self.clip, self.info = tokenizer, clip, info or ModelInfo()
        self.generation = generation or GenerationConfig()
        if clip is None:
            self.generation = self.generation.without_clip()
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
        """Device of the transformer."""
        return self.transformer.image_head.weight.device

    @property
    def precision(self) -> str:
        """Precision of the transformer: fp32, bf16 or fp16."""
        dtype = self.transformer.image_head.weight.dtype
        return next(name for name, kind in PRECISIONS.items() if kind == dtype)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path | None = None,
        *,
        clip: str | Path | None = None,
        device: str = "auto",
        precision: str = "fp32",
    ) -> DallE:
        """Load a model that `save_pretrained`, `push_to_hub` or a training wrote.

        Args:
            directory: folder, or name on Hugging Face (user/name); a folder takes precedence. None
                or "bundled" is the model that ships with the project.
            clip: folder or Hugging Face name of a CLIP; "none" for no reranking; None is the
                CLIP in the model's folder, if any.
            device: auto is cuda, else mps, else cpu.
            precision: precision of transformer and CLIP: fp32, bf16, fp16; auto is bf16 where the
                hardware supports it: faster, but images then differ slightly between machines.

        Raises: ValueError if a part is missing, damaged or does not fit the others.
        """
        folder = find_model(BUNDLED if directory is None else directory)
        if clip is None and (folder / CLIP_NAME).is_dir():
            clip = folder / CLIP_NAME
        on = pick_device(device)
        dtype = pick_precision(precision, on)
        named = next(name for name, kind in PRECISIONS.items() if kind == dtype)
        clip_model = None
        if clip is not None and clip != "none":
            clip_model = load_scoring_clip(clip, on, named)
        return cls(
            load_image_tokenizer(folder, on),
            Transformer.load(folder, on, dtype),
            Tokenizer.load(folder / VOCABULARY_NAME),
            clip_model,
            ModelInfo.load(folder),
            GenerationConfig.load(folder),
        )

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write all parts to `directory`, weights rounded to `dtype`; keep no other model's."""
        folder = Path(directory)
        refuse_other_clip(folder, self.clip)
        refuse_other_model(folder, "decoder.safetensors")
        with intact(self.transformer):
            with replaced_image_tokenizer(self.image_tokenizer, folder, dtype):
                self.transformer.save(folder, dtype)
            self.tokenizer.save(folder / VOCABULARY_NAME)
            self.info.save(folder)
            self.generation.save(folder)
        if self.clip is not None:
            self.clip.save_pretrained(folder / CLIP_NAME, dtype)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        num_candidates: int | None = None,
        seed: int = 0,
        known_codes: Tensor | None = None,
        negative_prompt: str = "",
        weighted: bool = False,
        batch_size: int | None = None,
        share: tuple[int, int] = (0, 1),
        on_row: OnRow | None = None,
        **sampling: Any,
    ) -> Iterator[list[Candidate]]:
        """Sample images for each prompt; options are checked before this returns.

        Options that are None or absent are those of `generation`, the model's own defaults.

        Args:
            num_candidates: images per prompt; candidate i depends on (seed, i) alone.
            known_codes: codes to keep, from `encode_known`.
            negative_prompt: text that guidance leads away from, rather than from no text.
            weighted: whether prompts have weights, see `dalle1.text.prompt_weights`.
            batch_size: candidates sampled at once; None is as many as fit in memory.
            share: (r, n) samples candidates r, r + n, r + 2n … only: the part of one of n
                processes.
            on_row: called after each row of codes of each batch with the codes, [B, N], and the
                number of rows.
            sampling: other fields of `GenerationConfig`, such as `rerank` and `temperature`.

        Returns: an iterator over the prompts, which yields the candidates of each, best first.
        """
        options = self.generation.updated(num_candidates=num_candidates, **sampling)
        check_counts(prompts, batch_size, share)
        reranker = self.reranker(options.rerank)
        parsed = WeightedPrompts.parse(prompts, weighted)
        prompts, contrasts = [clean_prompt(text) for text in parsed.texts], self._contrasts(parsed)
        captions = num_captions(options.guidance, contrasts, options.resample == "likelihood")
        fits = max_batch(self.transformer, batch_size, captions, share[1], options.together)
        text, empty = self._encode_prompts(prompts), self._negative(negative_prompt, options)
        known = check_known(known_codes, self.transformer)
        sample = partial(generate, sampling=options, known_codes=known, empty=empty)
        resampler = self._resampler(options, prompts, seed)
        sample_batch = partial(self._sample_batch, sample, text, contrasts, seed, resampler, on_row)
        indices = range(options.distinct(options.num_candidates))[share[0] :: share[1]]
        if not indices:
            return ([] for _ in prompts)
        grid = sample_batch, range(len(prompts)), indices, fits
        batches = sampled_whole(*grid, batch_size) if resampler else batched(*grid)
        return self._ranked(batches, prompts, seed, reranker, len(indices))

    def _sample_batch(
        self,
        sample: Callable[..., Tensor],
        text: Tensor,
        contrasts: Contrasts | None,
        seed: int,
        resampler: Callable[[range], Resampler] | None,
        on_row: OnRow | None,
        rows: range,
        columns: range,
    ) -> Tensor:
        """Sample codes of the candidates `columns` of the prompts `rows`."""
        uniforms = candidate_uniforms(seed, columns, self.transformer.config.image_len)
        each = on_row and (lambda codes, count: on_row(codes.flatten(0, 1), count))
        part, of_rows = text[rows.start : rows.stop], contrasts and contrasts.of(rows)
        resample = resampler and resampler(rows)
        how = {"contrasts": of_rows, "on_row": each, "resample": resample}
        return sample(self.transformer, part, uniforms, **how)

    def _resampler(
        self, options: GenerationConfig, prompts: Sequence[str], seed: int
    ) -> Callable[[range], Resampler] | None:
        """Return rows of prompts → what resamples their candidates; None without `resample`."""
        if options.resample == "none":
            return None
        if options.resample == "clip" and self.clip is None:
            raise ValueError(
                "resample is clip, and this model has no CLIP; name one, or use likelihood"
            )
        if options.resample_every >= (rows := self.transformer.config.grid_size):
            raise ValueError(
                f"resample_every is {options.resample_every}, expected less than the model's "
                f"{rows} rows of codes: candidates are resampled before the last row ends"
            )

        def resampler(rows: range) -> Resampler:
            score: RowScore = LikelihoodRowScore()
            if options.resample == "clip":
                assert self.clip is not None
                score = ClipRowScore(self.clip, prompts[rows.start : rows.stop], self.decode)
            return Resampler(score, options.resample_every, seed)

        return resampler

    def decode(self, codes: Tensor, batch_size: int = 16) -> list[Image.Image]:
        """Decode codes [B, W, W], `batch_size` at once; in bf16 like the model where it is fast."""
        images: list[Image.Image] = []
        in_bf16 = self.precision == "bf16" and pick_precision("auto", self.device) == torch.bfloat16
        for part in codes.split(batch_size):
            with inference(self.device, "bf16" if in_bf16 else "fp32"):
                pixels = self.image_tokenizer.decode(part).float()
            if not pixels.isfinite().all():
                raise ValueError("the image tokenizer's images are nan; its weights are damaged")
            images += to_pil(pixels)
        return images

    def encode(self, image: Image.Image | str | Path) -> Tensor:
        """Encode an image, or the file of one, as codes [W, W]: its central square."""
        if isinstance(image, (str, Path)):
            image = read_image_file(Path(image))
        if not isinstance(image, Image.Image):
            raise ValueError(f"image is a {type(image).__name__}, expected a PIL image or a path")
        square = centre_square(to_rgb(image), self.image_tokenizer.image_size, allow_upscale=True)
        pixels = to_float(to_tensor(square)[None])
        with inference(self.device):
            return self.image_tokenizer.encode(pixels.to(self.device))[0]

    def encode_known(
        self, image: Image.Image, *, keep_rows: int | None = None, mask: Image.Image | None = None
    ) -> Tensor:
        """Encode the parts of `image` to keep, [N]; other codes are UNKNOWN, to be sampled.

        Args:
            keep_rows: number of rows of codes to keep, from the top (paper, figure 2c: 15 of 32).
            mask: an image of the same size instead, white where new codes are sampled, or
                transparent there; see `codes_to_sample`.
        """
        if (keep_rows is None) == (mask is None):
            raise ValueError("expected either keep_rows or mask, to choose what to keep")
        codes, width = self.encode(image).clone(), self.image_tokenizer.grid_size
        if keep_rows is not None:
            if not 0 <= keep_rows < width:
                raise ValueError(f"keep_rows is {keep_rows}, expected 0 to {width - 1}")
            codes[keep_rows:] = UNKNOWN
            return codes.flatten()
        assert mask is not None
        unknown = codes_to_sample(mask, image, width)
        return codes.masked_fill(unknown.to(codes.device), UNKNOWN).flatten()

    def _encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize prompts as [B, L], with one warning for each that has unknown words."""
        for prompt in dict.fromkeys(prompts):
            if self.tokenizer.words and (
                message := self.tokenizer.words.unknown_words_message(prompt)
            ):
                warnings.warn(message, stacklevel=3)
        return torch.stack([self.encode_prompt(prompt) for prompt in prompts])

    def _contrasts(self, prompts: WeightedPrompts) -> Contrasts | None:
        """Tokenize what the weights of prompts compare them with; None without weights."""
        if not prompts.others:
            return None
        tokens = [torch.stack([self._caption(text) for text in each]) for each in prompts.others]
        return Contrasts(text=torch.stack(tokens), strengths=torch.tensor(prompts.strengths))

    def _negative(self, prompt: str, options: Sampling) -> Tensor:
        """Tokenize the caption that guidance leads away from, [1, L]."""
        check_negative_prompt(prompt, options.guidance)
        return self._caption(prompt)[None]

    def _caption(self, prompt: str) -> Tensor:
        """Tokenize a prompt, or the empty caption: [L]."""
        return self.encode_prompt(prompt) if prompt.strip() else self.empty_caption()[0]

    def empty_caption(self) -> Tensor:
        """Return the tokens of a caption without text, [1, L]."""
        return self.tokenizer.encode([""], self.transformer.config.text_len)

    def encode_prompt(self, prompt: str, *, ends: bool = True) -> torch.Tensor:
        """Tokenize a prompt, or the beginning of one (not `ends`): [L]; warn if it is cut."""
        length = self.transformer.config.text_len
        return self.tokenizer.encode_prompt(clean_prompt(prompt), length, ends).to(self.device)

    def likelihood(self) -> Reranker:
        return LikelihoodReranker(self.bits)

    def bits(self, prompt: str, codes: Tensor, batch_size: int = 8) -> tuple[float, Tensor]:
        """Return −log₂ p of `prompt` per token, and −log₂ p of each image under it per code.

        Args:
            codes: [B, W, W].

        Returns: bits per text token, its end counted and its padding not; bits per code, [B].
        """
        text = self.encode_prompt(prompt) if prompt else self.empty_caption()[0]
        text, text_bits, code_bits = text.to(self.device), 0.0, []
        for part in codes.to(self.device).split(batch_size):
            with inference(self.device), intact(self.transformer):
                captions = text.expand(len(part), -1)
                text_losses, image_losses = self.transformer.losses(captions, part)
            tokens = int((text < self.transformer.config.text_vocab).sum())
            counted = tokens + self.transformer.config.pad_targets
            counted -= len(text) - text_losses.shape[1]  # without start tokens, the first is free
            text_bits = float(text_losses[0, :counted].sum()) / max(counted, 1) / math.log(2)
            code_bits.append(image_losses.mean(1) / math.log(2))
        return text_bits, torch.cat(code_bits)

    def log_likelihood(self, prompt: str, image: Image.Image) -> tuple[float, float]:
        """Return bits per text token of `prompt`, and bits per code of `image` under it.

        Fewer bits are likelier. An empty prompt is no caption.
        """
        text, codes = self.bits(prompt, self.encode(image)[None])
        return text, float(codes)

    def complete(
        self, beginning: str, *, count: int = 4, seed: int = 0, **sampling: Any
    ) -> list[str]:
        """Sample `count` continuations of the beginning of a caption."""
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1")
        text = self.encode_prompt(beginning, ends=False)
        uniforms = candidate_uniforms(seed, range(count), len(text))
        with inference(self.device), intact(self.transformer):
            tokens = complete_text(self.transformer, text, uniforms, Sampling(**sampling))
        return self.tokenizer.decode(tokens)
