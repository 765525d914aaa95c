"""What the commands that import whole models share: their options, and what they write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dalle1.devices import PRECISIONS
from dalle1.image_tokenizer import ImageTokenizer
from dalle1.model.transformer import Transformer
from dalle1.model_card import ModelInfo
from dalle1.storage import checkpoints
from dalle1.text.bpe import Tokenizer
from dalle1.vqgan import VQGAN

VOCABULARY_NAME = "vocab.json"
NOTES: dict[str | None, str] = {"cc-by-nc-sa-4.0": ": no commercial use, share alike"}
"""License → what it asks for."""


def for_grid(vqgan: VQGAN, transformer: Transformer) -> VQGAN:
    """Return the VQGAN, for images of as many codes as the transformer samples."""
    size = transformer.config.grid_size * vqgan.config.downsampling
    vqgan.config = replace(vqgan.config, image_size=size)
    return vqgan


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of all commands that import a transformer."""

    out: Path
    """Folder to write the model to."""
    heads: int | None = None
    """Attention heads, which no file tells. None: those of the published models."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the parameters that are written. None: that of the file."""

    def check(self) -> None:
        """Raise ValueError where the options are of no use, before anything is read."""
        if checkpoints(self.out):
            raise ValueError(f"{self.out} holds a training; use another --out")
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads is {self.heads}, expected at least 1")

    def write(
        self,
        image_tokenizer: ImageTokenizer,
        transformer: Transformer,
        tokenizer: Tokenizer,
        info: ModelInfo,
    ) -> None:
        """Write a model folder, and print what it is and its license, if that is known."""
        config = transformer.config
        if image_tokenizer.codebook_size != config.codebook_size:
            raise ValueError(
                f"the image tokenizer has {image_tokenizer.codebook_size} codes, the transformer "
                f"{config.codebook_size}; use the image tokenizer that it was trained with"
            )
        if tokenizer.vocab_size != config.text_vocab:
            raise ValueError(
                f"the vocabulary has {tokenizer.vocab_size} tokens, the transformer "
                f"{config.text_vocab}; use the vocabulary that it was trained with"
            )
        dtype = None if self.precision is None else PRECISIONS[self.precision]
        image_tokenizer.save(self.out)
        transformer.save(self.out, dtype)
        tokenizer.save(self.out / VOCABULARY_NAME)
        info.save(self.out)
        count = sum(parameter.numel() for parameter in transformer.parameters())
        print(
            f"The model is in {self.out}: {count / 1e6:,.0f} million parameters, "
            f"{config.text_len} text positions, {config.image_len} codes, images of "
            f"{image_tokenizer.image_size} × {image_tokenizer.image_size} pixels"
        )
        terms = info.license or "unknown, that of whoever trained the model"
        print(f"License of the published weights: {terms}{NOTES.get(info.license, '')}")
