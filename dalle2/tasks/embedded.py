"""What the trainings of priors and decoders share: pairs of caption, latents and embedding."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dalle1.clip import Clip
from dalle1.clip.loading import clip_folder
from dalle1.data import Loader, Source, first_examples
from dalle1.data.spec import split_names
from dalle1.training import distributed
from dalle1.training.config import TrainConfig, resolve_precision
from dalle1.training.loop import train_loader
from dalle1.training.resume_key import contents_of
from dalle1.training.task import Model, Task
from dalle2.conditioning import Caption, CaptionReader, TextEncoder, clip_digest
from dalle2.embedded import EmbeddedSource, Encoders, open_embedded

MAX_BYTES = 1024
"""Bytes of a caption that a text encoder reads, at most."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedTrainConfig(TrainConfig):
    """Settings of a training on embedded data."""

    data: str = "runs/embedded"
    """Folder that `dalle1 embed` wrote; or several with weights: a::2,b::1."""
    clip: str = "bundled"
    """Folder of the CLIP that the data was embedded with, or "bundled"."""
    validation_pairs: int = 256
    """Maximum number of validation pairs, which are not trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_pairs < 2:
            raise ValueError(f"validation_pairs is {self.validation_pairs}, expected at least 2")


@dataclass(frozen=True)
class Paired:
    """Prepares one example: the stored numbers, and a caption's tokens."""

    tokenizer: Any
    text_len: int

    def __call__(self, sample: Any, rng: random.Random) -> Mapping[str, Tensor]:
        how = {"truncation": True, "max_length": self.text_len, "padding": "max_length"}
        found = self.tokenizer(sample.caption(rng), **how)
        return {
            "numbers": sample.codes(rng),
            "input_ids": torch.tensor(found["input_ids"]),
            "attention_mask": torch.tensor(found["attention_mask"]),
        }


class PairedText:
    """Prepares one example: the stored numbers and sizes, and a caption's UTF-8 bytes."""

    def __call__(self, sample: Any, rng: random.Random) -> Mapping[str, Tensor]:
        text = sample.caption(rng).encode("utf-8", "replace")[:MAX_BYTES]
        padded = torch.zeros(MAX_BYTES, dtype=torch.uint8)
        padded[: len(text)] = torch.tensor([*text], dtype=torch.uint8)
        numbers, sizes = sample.source.sized_crop(sample.index, rng)
        return {"numbers": numbers, "sizes": sizes, "caption": padded}


def texts_of(captions: Tensor) -> list[str]:
    """Return the captions that `PairedText` stored: [B, MAX_BYTES] → B texts."""
    return [bytes(row[row > 0].tolist()).decode("utf-8", "ignore") for row in captions.cpu()]


class EmbeddedPairs:
    """Batches of embedded data, and what reads their captions."""

    def __init__(
        self,
        config: EmbeddedTrainConfig,
        encoders: Encoders | None,
        device: torch.device,
        text: TextEncoder | None = None,
    ) -> None:
        """Open the data; ValueError where other models than those of `config` embedded it.

        Args:
            encoders: autoencoder and CLIP; None compares the CLIP alone.
            text: reader of the captions; None is the CLIP.
        """
        self.clip = Clip.from_pretrained(config.clip, device)
        self.read = CaptionReader(self.clip)
        source, held = (open_embedded(config.data, s, encoders) for s in ("train", "validation"))
        if encoders is None:
            self._refuse_other_clip(config)
        self.text = text
        self.prepare: Any = (
            PairedText() if text else Paired(self.clip.tokenizer, self.clip.text_len)
        )
        self.loader: Loader = train_loader(source, self.prepare, config)
        self.source, self.device = source, device
        self.held = self.first(held, config.validation_pairs)

    def first(self, source: Source, count: int) -> dict[str, Tensor]:
        """Return the first pairs of a source as one batch."""
        found = distributed.broadcast_from_main(
            partial(first_examples, source, self.prepare, count)
        )
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    @staticmethod
    def _refuse_other_clip(config: EmbeddedTrainConfig) -> None:
        """Raise ValueError where the data was embedded with another CLIP than --clip."""
        for name in split_names(config.data)[0]:
            found = EmbeddedSource(Path(name)).dvae.split("-")[-1]
            if found != clip_digest(clip_folder(config.clip)):
                raise ValueError(
                    f"the embeddings in {name} are of another CLIP than {config.clip}; name the "
                    "CLIP that they were embedded with by --clip"
                )

    def contents(self, config: EmbeddedTrainConfig, **files: Any) -> Any:
        """Return what identifies the data and the models, for resuming."""
        clip = clip_folder(config.clip) / "model.safetensors"
        found = distributed.broadcast_from_main(
            partial(contents_of, self.source, clip=clip, **files)
        )
        return found | ({"text_encoders": {"digest": self.text.digest()}} if self.text else {})

    def split(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Caption]:
        """Return the latents [B, c·h·w], the embeddings z_i [B, D] and the captions of a batch."""
        width = self.read.embedding_width
        numbers = batch["numbers"]
        if self.text is not None:
            caption = replace(self.text(texts_of(batch["caption"])), sizes=batch["sizes"])
            return numbers[:, :-width], numbers[:, -width:], caption
        length = int(batch["attention_mask"].sum(1).max())
        inputs = {name: batch[name][:, :length] for name in ("input_ids", "attention_mask")}
        return numbers[:, :-width], numbers[:, -width:], self.read.read(inputs)


Config = TypeVar("Config", bound=EmbeddedTrainConfig)


class EmbeddedTask(Task[Model], Generic[Model, Config]):
    """Trains a prior or a decoder on embedded data."""

    def __init__(self, config: Config) -> None:
        self.device = distributed.init(config.device)
        self.config = config = resolve_precision(config, self.device)
        self.pairs = EmbeddedPairs(config, self.encoders(), self.device, self.text_encoder())
        self.loader, self.held = self.pairs.loader, self.pairs.held
        self.contents = self.pairs.contents(config, **self.files())
        torch.manual_seed(config.seed)
        self.model = self.initial().to(self.device)

    def encoders(self) -> Encoders | None:
        """Return the models that must have embedded the data; None compares the CLIP alone."""
        return None

    def text_encoder(self) -> TextEncoder | None:
        """Return the reader of captions; None is the CLIP."""
        return None

    def files(self) -> Mapping[str, Path]:
        """Return the files of other models of the config, by setting, for resuming."""
        return {}

    def initial(self) -> Model:
        """Return a new model."""
        raise NotImplementedError
