"""What the commands that import whole models share: their options, and what they write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dalle1.devices import PRECISIONS
from dalle1.image_tokenizer import ImageTokenizer, replaced_image_tokenizer
from dalle1.locking import folder_lock
from dalle1.model.transformer import Transformer
from dalle1.model_card import ModelInfo
from dalle1.sampling.generation import GenerationConfig
from dalle1.storage import checkpoints, refuse_other_clip
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


MODELS = "transformer", "decoder", "prior"
"""Beginnings of the files of models that need their own image tokenizer."""


def refuse_training(out: Path) -> None:
    """Raise a ValueError where a folder holds checkpoints, which are loaded before its files."""
    if checkpoints(out):
        raise ValueError(f"{out} holds a training; use another --out")


def print_license(license: str | None) -> None:
    """Print the license of published weights, if it is known."""
    terms = license or "unknown, that of whoever trained the model"
    print(f"License of the published weights: {terms}{NOTES.get(license, '')}")


def write_image_tokenizer(model: ImageTokenizer, out: Path, license: str | None) -> None:
    """Write an image tokenizer without a transformer, and print what it is and its license."""
    if models := [name for name in MODELS if any(out.glob(f"{name}*.safetensors"))]:
        raise ValueError(
            f"{out} holds a {models[0]}, expected no model, since it needs the image tokenizer "
            "that it was trained with; use another --out"
        )
    with folder_lock(out), replaced_image_tokenizer(model, out) as path:
        pass
    print(
        f"The image tokenizer is {path}: {model.codebook_size} codes, "
        f"{model.downsampling}×{model.downsampling} pixels each"
    )
    print_license(license)


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
        refuse_training(self.out)
        refuse_other_clip(self.out)
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads is {self.heads}, expected at least 1")

    def write(
        self,
        image_tokenizer: ImageTokenizer,
        transformer: Transformer,
        tokenizer: Tokenizer,
        info: ModelInfo,
        generation: GenerationConfig,
    ) -> None:
        """Write a model folder, and print what it is and its license, if that is known.

        Args:
            generation: the authors' defaults of sampling.
        """
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
        with folder_lock(self.out):
            with replaced_image_tokenizer(image_tokenizer, self.out):
                transformer.save(self.out, dtype)
            tokenizer.save(self.out / VOCABULARY_NAME)
            info.save(self.out)
            generation.save(self.out)
        count = sum(parameter.numel() for parameter in transformer.parameters())
        print(
            f"The model is in {self.out}: {count / 1e6:,.0f} million parameters, "
            f"{config.text_len} text positions, {config.image_len} codes, images of "
            f"{image_tokenizer.image_size} × {image_tokenizer.image_size} pixels"
        )
        print_license(info.license)
