"""From a prompt to images by DALL·E 2: prior, decoder, autoencoder, CLIP, upsampler.

Candidates are reranked by CLIP as the decoder made them; only those that are kept are upsampled.

P prompts, C candidates of each, D width of CLIP embeddings, c h w latents of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle1.clip import Clip
from dalle1.data.cleaning import clean_prompt
from dalle1.data.images import to_float, to_pil, to_tensor
from dalle1.devices import PRECISIONS, inference, pick_device, pick_precision
from dalle1.hub import find_model
from dalle1.model.transformer import FILE_NAME as TRANSFORMER_FILE
from dalle1.model_card import ModelInfo
from dalle1.sampling.batching import batched, check_counts
from dalle1.sampling.generation import GenerationConfig
from dalle1.sampling.guidance import check_negative_prompt
from dalle1.sampling.ranking import RankingPipeline
from dalle1.sampling.reranking import Candidate
from dalle1.storage import CLIP_NAME, refuse_other_model
from dalle1.text.prompt_weights import WeightedPrompts
from dalle2.ar_prior import Prior, load_prior
from dalle2.autoencoder import AnyAutoencoder, load_autoencoder
from dalle2.clip_guidance import ClipGuide
from dalle2.compatibility import COMPLETES_NOTHING, check_parts, refuse_codes
from dalle2.conditioning import Caption, CaptionReader, TextEncoder
from dalle2.decoder import decoder_denoiser, sample_latents
from dalle2.diffusion.schedule import Schedule
from dalle2.embedded import Encoders
from dalle2.options import EmbeddingName, UnclipOptions
from dalle2.prior import FILE_NAME as PRIOR_FILE
from dalle2.prior import DiffusionPrior
from dalle2.text_encoders import load_text_encoders
from dalle2.unet import UNet
from dalle2.upsampler import FILE_NAME as UPSAMPLER_FILE
from dalle2.upsampler import Upsampler

MAX_BATCH = 64
"""Most candidates that are denoised at once."""
OnRow = Callable[[Tensor, int], None]


class Unclip(RankingPipeline):
    """A CLIP, an autoencoder, a decoder and perhaps a prior; without one, captions are decoded."""

    def __init__(
        self,
        autoencoder: AnyAutoencoder,
        decoder: UNet,
        encoder: Clip,
        prior: Prior | None = None,
        upsampler: Upsampler | None = None,
        *,
        text: TextEncoder | None = None,
        clip: Clip | None = None,
        generation: GenerationConfig | None = None,
        info: ModelInfo | None = None,
    ) -> None:
        """Join the parts; ValueError where they do not fit each other.

        Args:
            encoder: the CLIP of prior and decoder.
            text: what the decoder reads captions by; None is the CLIP.
            clip: the CLIP that reranks; None for no reranking.
        """
        self.image_tokenizer, self.decoder, self.prior = autoencoder, decoder, prior
        self.encoder, self.read, self.clip = encoder, CaptionReader(encoder), clip
        self.upsampler, self.text = upsampler, text
        self.info = info or ModelInfo()
        self.generation = generation or GenerationConfig(guidance=2.0)
        self.options = UnclipOptions(embedding=self._embedding())
        check_parts(autoencoder, decoder, self.read, text, prior)

    def _embedding(self) -> EmbeddingName:
        """Return what the decoder is told by default: what it was trained on."""
        if self.decoder.config.embedding == "text":
            return "caption"
        return "none" if self.prior is None else "prior"

    @property
    def device(self) -> torch.device:
        """Device of the decoder."""
        return self.decoder.input.weight.device

    @property
    def precision(self) -> str:
        """Precision of prior and decoder."""
        return "fp32"

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        clip: str | Path | None = None,
        device: str = "auto",
        precision: str = "fp32",
    ) -> Unclip:
        """Load a model that `save_pretrained` or a training of a decoder wrote.

        Args:
            clip: folder or Hugging Face name of a CLIP that reranks; "none" for no reranking; None
                is the model's own.
            device: auto is cuda, else mps, else cpu.
            precision: precision of the CLIP; prior and decoder compute in fp32.
        """
        folder, on = find_model(directory), pick_device(device)
        dtype = pick_precision(precision, on)
        named = next(name for name, kind in PRECISIONS.items() if kind == dtype)
        own_clip = folder / CLIP_NAME if (folder / CLIP_NAME).is_dir() else "bundled"
        encoder = Clip.from_pretrained(own_clip, on)
        reranker = encoder if clip is None else None
        if clip is not None and clip != "none":
            reranker = Clip.from_pretrained(clip, on, named)
        decoder = UNet.load(folder, on)
        if (found := str(Encoders.of(folder, own_clip))) != decoder.config.encoders:
            raise ValueError(
                f"the decoder in {folder} was trained with the autoencoder and CLIP "
                f"{decoder.config.encoders}, and {found} lie beside it (without {CLIP_NAME}/, the "
                "bundled CLIP); use those that it was trained with"
            )
        autoencoder = load_autoencoder(folder, on)
        size = autoencoder.downsampling * decoder.config.side
        autoencoder.config = replace(autoencoder.config, image_size=size)  # type: ignore[arg-type]
        names = decoder.config.text_encoders
        has_prior, has_upsampler = (
            (folder / name).is_file() for name in (PRIOR_FILE, UPSAMPLER_FILE)
        )
        return cls(
            autoencoder,
            decoder,
            encoder,
            load_prior(folder, on) if has_prior else None,
            Upsampler.load(folder, on) if has_upsampler else None,
            text=load_text_encoders(names, on, folder) if names else None,
            clip=reranker,
            generation=GenerationConfig.load(folder),
            info=ModelInfo.load(folder),
        )

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write all parts to `directory`, weights rounded to `dtype`.

        Raises: ValueError where the folder holds a DALL·E 1, or a part that this model has not.
        """
        folder = Path(directory)
        parts = {PRIOR_FILE: self.prior, UPSAMPLER_FILE: self.upsampler, TRANSFORMER_FILE: None}
        for file in (name for name, part in parts.items() if part is None):
            refuse_other_model(folder, file)
        self.image_tokenizer.save(folder, dtype)
        self.decoder.save(folder, dtype)
        self.encoder.save_pretrained(folder / CLIP_NAME, dtype)
        self.generation.save(folder)
        self.info.save(folder)
        if self.text is not None:
            self.text.save(folder, dtype)
        for part in (self.prior, self.upsampler):
            if part is not None:
                part.save(folder, dtype)

    def with_parts(
        self,
        prior: Prior | None,
        upsampler: Upsampler | None = None,
        autoencoder: AnyAutoencoder | None = None,
    ) -> Unclip:
        """Return the same model with another prior; None keeps its upsampler and autoencoder."""
        return Unclip(
            autoencoder or self.image_tokenizer,
            self.decoder,
            self.encoder,
            prior,
            upsampler or self.upsampler,
            text=self.text,
            clip=self.clip,
            generation=self.generation,
            info=self.info,
        )

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        known_codes: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        negative_prompt: str = "",
        weighted: bool = False,
        batch_size: int | None = None,
        share: tuple[int, int] = (0, 1),
        on_row: OnRow | None = None,
        **sampling: Any,
    ) -> Iterator[list[Candidate]]:
        """Sample images for each prompt; options are checked before this returns.

        Args:
            known_codes: None; this model completes no images.
            image_embeddings: z_i of each prompt, unit vectors [P, D], instead of the prior's.
            negative_prompt, weighted: see `DallE.sample`; the prior reads prompts without weights.
            batch_size: candidates denoised at once; None is 64.
            seed, share, on_row: see `DallE.sample`; all rows of a batch are done at once.
            sampling: `num_candidates`, `rerank`, `guidance`, or fields of `UnclipOptions`.

        Returns: an iterator over the prompts, which yields the candidates of each, best first.
        """
        check_counts(prompts, batch_size, share)
        if image_embeddings is not None:
            self._check_embeddings(image_embeddings, len(prompts))
            sampling["embedding"] = "caption"  # no prior is needed
        options, how = self._split(sampling)
        refuse_codes(options, known_codes)
        check_negative_prompt(negative_prompt, options.guidance)
        reranker, most = self.reranker(options.rerank), batch_size or MAX_BATCH
        parsed = WeightedPrompts.parse([*map(clean_prompt, prompts)], weighted)
        indices = range(options.num_candidates)[share[0] :: share[1]]

        def sample_batch(rows: range, columns: range) -> Tensor:
            z = None if image_embeddings is None else image_embeddings[rows.start : rows.stop]
            told = parsed.of(rows), negative_prompt.strip(), z
            latents = self.latents(*told, columns, seed, options.guidance, how)
            for row in range(latents.shape[-2] if on_row else 0):
                on_row(latents.flatten(0, 1), row + 1)  # type: ignore[misc]
            return latents

        if not indices:
            return ([] for _ in prompts)
        fits = range(len(prompts)), indices, lambda rows, columns: rows * columns <= most
        of_prompts = parsed.texts, seed, reranker, len(indices)
        return self._ranked(batched(sample_batch, *fits), *of_prompts)

    def _split(self, sampling: Mapping[str, Any]) -> tuple[GenerationConfig, UnclipOptions]:
        """Split options into those of all models and those of this one; check the latter."""
        own = {field.name for field in fields(UnclipOptions)}
        asked = {k: x for k, x in sampling.items() if k in own and x is not None}
        how = replace(self.options, **asked)
        self._refuse_missing(how, asked)
        how = replace(how, **{k: min(getattr(how, k), most) for k, most in self._times().items()})
        return self.generation.updated(**{k: sampling[k] for k in sampling.keys() - own}), how

    def latents(
        self,
        told: WeightedPrompts,
        negative: str,
        image_embeddings: Tensor | None,
        columns: Sequence[int],
        seed: int,
        guidance: float,
        how: UnclipOptions,
    ) -> Tensor:
        """Sample latents of the candidates `columns` of P prompts: [P, C, c, h, w]."""
        prompts, count = len(told.texts), len(columns)
        caption, read = self.read(told.texts), self.text or self.read
        with inference(self.device):
            z = self._embeddings(caption, image_embeddings, columns, seed, how)
            keep = torch.full((len(z),), how.embedding != "none", device=self.device)
            against = read([negative] * prompts).repeat(count) if negative.strip() else None
            denoise = decoder_denoiser(
                self.decoder,
                z,
                (read(told.texts) if self.text else caption).repeat(count),
                guidance=guidance,
                keep_embedding=keep,
                negative=against,
                contrasts=read.contrasts(told, count),
            )
            if how.clip_guidance:
                guide = self._guide(told.texts, how.clip_guidance, count)
                denoise = replace(denoise, guide=guide)
            latents = sample_latents(
                self.decoder,
                denoise,
                columns,
                seed=seed,
                steps=how.steps,
                sampler=how.sampler,
                eta=how.eta,
                repeat=prompts,
            )
        if how.clip_guidance and not latents.isfinite().all():
            raise ValueError(
                f"clip_guidance is {how.clip_guidance:g}, and latents are nan; use a smaller one"
            )
        return latents.unflatten(0, (prompts, count))

    def _embeddings(
        self,
        caption: Caption,
        image_embeddings: Tensor | None,
        columns: Sequence[int],
        seed: int,
        how: UnclipOptions,
    ) -> Tensor:
        """Return the embeddings that the decoder is told, of all candidates: [P · C, D]."""
        if image_embeddings is not None:
            return image_embeddings.to(self.device).repeat_interleave(len(columns), 0)
        if how.embedding != "prior":
            return caption.embedding.repeat_interleave(len(columns), 0)
        assert self.prior is not None
        return self.prior.sample(
            caption,
            columns,
            seed=seed,
            steps=how.prior_steps,
            guidance=how.prior_guidance,
            samples=how.prior_samples,
        ).flatten(0, 1)

    def _guide(self, texts: Sequence[str], weight: float, count: int = 1) -> ClipGuide:
        """Return what moves `count` candidates of each text towards it, by the reranking CLIP."""
        clip, config = self.clip or self.encoder, self.decoder.config
        return ClipGuide(
            clip=clip,
            autoencoder=self.image_tokenizer,
            schedule=Schedule(config.schedule, config.times),
            text=clip.embed_text(texts).to(self.device).repeat_interleave(count, 0),
            weight=weight,
        )

    def _check_embeddings(self, embeddings: Tensor, prompts: int) -> None:
        """Raise ValueError unless there is one embedding of the CLIP's width for each prompt."""
        shape = prompts, self.read.embedding_width
        if embeddings.shape != shape:
            raise ValueError(
                f"image_embeddings are {tuple(embeddings.shape)}, expected {shape}; use those of "
                "the model's own CLIP, one for each prompt"
            )

    def _times(self) -> dict[str, int]:
        """Return the most steps of each part."""
        times = {"steps": self.decoder.config.times}
        if isinstance(self.prior, DiffusionPrior):
            times["prior_steps"] = self.prior.config.times
        if self.upsampler is not None:
            times["upsampler_steps"] = self.upsampler.config.times
        return times

    def _refuse_missing(self, how: UnclipOptions, asked: Mapping[str, Any]) -> None:
        """Raise ValueError for options of parts that this model lacks."""
        if how.clip_guidance:
            self._guide([""], how.clip_guidance).check()
        if how.embedding != "none" and not self.decoder.config.embedding_width:
            raise ValueError(
                f"embedding is {how.embedding!r}, expected none: this decoder reads captions alone"
            )
        if how.embedding == "prior" and self.prior is None:
            raise ValueError(
                "embedding is 'prior', and this model has no prior; use none or caption, or join "
                "one by dalle1 export --prior FOLDER"
            )
        for name, most in self._times().items():
            if asked.get(name, 0) > most:
                raise ValueError(f"{name} is {asked[name]}, expected at most {most}")
        if asked.get("upsampler_steps") and self.upsampler is None:
            raise ValueError(
                f"upsampler_steps is {how.upsampler_steps}, expected 0: this model has no "
                "upsampler; join one by dalle1 export --upsampler FOLDER"
            )

    def finished(
        self, candidates: list[Candidate], upsampler_steps: int | None = None
    ) -> list[Candidate]:
        """Upsample the candidates that are kept, one after another, as pixels need memory."""
        steps = self.options.upsampler_steps if upsampler_steps is None else upsampler_steps
        if self.upsampler is None or steps == 0:
            return candidates
        found = []
        for candidate in candidates:
            small = to_float(to_tensor(candidate.image)[None]).to(self.device)
            with inference(self.device):
                large = self.upsampler.upsample(
                    small, [candidate.index], seed=candidate.seed, steps=steps
                )
            found.append(replace(candidate, image=to_pil(large)[0]))
        return found

    def encode_known(self, image: Image.Image, **region: Any) -> Tensor:
        """Raise ValueError, as this model completes no images."""
        raise ValueError(COMPLETES_NOTHING)

    def decode(self, codes: Tensor, batch_size: int = 16) -> list[Image.Image]:
        """Decode latents [B, c, h, w] to images, `batch_size` at once."""
        images: list[Image.Image] = []
        for part in codes.split(batch_size):
            with inference(self.device):
                pixels = self.image_tokenizer.decode(part)
            if not pixels.isfinite().all():
                raise ValueError("the decoder's images are nan; its weights are damaged")
            images += to_pil(pixels)
        return images
