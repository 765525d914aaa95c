"""How many bits a model needs for held-out pairs: per text token, per code, per image.

B pairs, L text positions, W grid, N = W² codes. Bits are −log₂ p of what is there: the size that an
ideal entropy coder would reach with the model's probabilities.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.data import Example, ReadOptions, Sample, Source, first_examples, open_source
from dalle1.data.codes import CodeSample, open_codes
from dalle1.data.crops import centre_square
from dalle1.data.images import to_float, to_tensor
from dalle1.devices import inference
from dalle1.evaluation.report import Scores
from dalle1.image_tokenizer import ImageTokenizer, image_tokenizer_file
from dalle1.model.transformer import TransformerConfig
from dalle1.pipeline import DallE
from dalle1.storage import model_folder, same_tensors
from dalle1.text.bpe import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BitsOptions:
    """Measure the bits per text token, per code and per image that a model needs."""

    model: str = "bundled"
    """Folder of the model, or "bundled"."""
    data: str = "toybox"
    """Dataset, as in training: images, or codes of this model's image tokenizer. Its validation
    split is measured."""
    dvae: Path | None = None
    """Folder of the image tokenizer that encoded the data. None: the model's own; a training saves
    it as another file, so that codes are not recognised."""
    images: int = 256
    """Maximum number of pairs."""
    batch_size: int = 8
    """Number of pairs measured at once."""
    allow_upscale: bool = False
    """Enlarge images that are too small. By default, they are skipped."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else mps, else cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products."""
    out: Path = Path("runs/bits-evaluation")
    """Folder for bits.json."""

    def __post_init__(self) -> None:
        for name in ("images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


class Pairs(NamedTuple):
    """Captions with their padding, [B, L], and the codes of their images, [B, W, W]."""

    text: Tensor
    codes: Tensor


class TokenModel(Protocol):
    """A model of [text, codes] that returns −ln p of every token, as `Transformer.losses` does."""

    config: TransformerConfig

    def losses(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return −ln p of every token: [B, L] of the text, [B, N] of the image."""


def evaluate_bits(options: BitsOptions) -> Scores:
    """Yield the bits of held-out pairs under a model, with and without their captions."""
    model = DallE.from_pretrained(
        options.model, clip="none", device=options.device, precision=options.precision
    )
    folder = tokenizer_folder(options.model, options.dvae)
    count, upscale = options.images, options.allow_upscale
    held = read_pairs(model, folder, options.data, count, allow_upscale=upscale)
    yield from bits_scores(model.transformer, held, model.empty_caption(), options.batch_size)


def bits_scores(model: TokenModel, held: Pairs, empty: Tensor, batch_size: int = 8) -> Scores:
    """Yield the bits of `held` under a model; "±" is the half-width of a 95 % interval.

    Args:
        empty: an empty caption, [1, L], with the tokens that the vocabulary sets around it.
    """
    text_bits, code_bits = token_bits(model, held, batch_size)
    counted = is_counted(model.config, held.text)
    per_image = code_bits.sum(1)
    yield "images", len(per_image)
    yield "tokens per caption", float(counted.sum(1).double().mean())
    yield "bits per text token", float(text_bits[counted].mean())
    yield "bits per caption", float((text_bits * counted).sum(1).mean())
    yield "bits per code", float(code_bits.mean())
    if len(per_image) > 1:
        error = float(per_image.std()) / math.sqrt(len(per_image))
        yield "bits per code ±", 1.96 * error / code_bits.shape[1]
    yield "bits per image", float(per_image.mean())
    _, without = token_bits(model, Pairs(empty.expand_as(held.text), held.codes), batch_size)
    yield "bits per image, no caption", float(without.sum(1).mean())


def token_bits(model: TokenModel, held: Pairs, batch_size: int = 8) -> tuple[Tensor, Tensor]:
    """Return −log₂ p of every token, on the CPU in fp64: [B, L] of the text, [B, N] of the image.

    A first text token that nothing predicts has 0.

    Raises: ValueError where a model's probabilities are nan.
    """
    device = _device_of(model)
    found: list[tuple[Tensor, Tensor]] = []
    for text, codes in zip(held.text.split(batch_size), held.codes.split(batch_size), strict=True):
        with inference(device):
            losses = model.losses(text.to(device), codes.to(device))
        found.append((losses[0].double().cpu(), losses[1].double().cpu()))
    text_bits, code_bits = (torch.cat(parts) / math.log(2) for parts in zip(*found, strict=True))
    text_bits = F.pad(text_bits, (held.text.shape[1] - text_bits.shape[1], 0))
    if code_bits.isnan().any():
        raise ValueError("the model's logits are nan, expected numbers; its weights are damaged")
    return text_bits, code_bits


def is_counted(config: TransformerConfig, text: Tensor) -> Tensor:
    """Return which positions of text [B, L] count: a caption's tokens, and its end if learned.

    Without start tokens, nothing predicts the first.
    """
    lengths = (text < config.text_vocab).sum(1, keepdim=True) + config.pad_targets
    positions = torch.arange(text.shape[1])
    return (positions >= (config.image_start == "none")) & (positions < lengths)


def tokenizer_folder(model: str, dvae: Path | None) -> Path:
    """Return the folder of the image tokenizer that encoded the data: `dvae`, or the model's.

    Raises: ValueError where `dvae` is another image tokenizer than the model's.
    """
    own = model_folder(model)
    if dvae is None:
        return own
    if not same_tensors(image_tokenizer_file(own), image_tokenizer_file(dvae)):
        raise ValueError(
            f"dvae is {dvae}, another image tokenizer than that in {own}; use the one that the "
            "model was trained with"
        )
    return dvae


def read_pairs(
    model: DallE,
    folder: Path,
    data: str,
    count: int,
    *,
    split: str = "validation",
    allow_upscale: bool = False,
) -> Pairs:
    """Return the first `count` pairs of a split of `data`, or as many as there are.

    Args:
        folder: the folder of its image tokenizer, to recognise codes; see `tokenizer_folder`.

    Raises: ValueError where the data has no pairs, or holds codes of another image tokenizer.
    """
    image_tokenizer, text_len = model.image_tokenizer, model.transformer.config.text_len
    size = image_tokenizer.image_size
    source: Source | None = open_codes(data, split, folder, image_tokenizer)
    if source is None:
        source = open_source(data, split, ReadOptions(size=size))
    prepare = partial(_prepare, model.tokenizer, text_len, size, allow_upscale)
    examples = first_examples(source, prepare, count)
    if "codes" in examples:
        return Pairs(examples["text"], examples["codes"])
    codes = torch.cat(list(encode_images(image_tokenizer, examples["images"])))
    return Pairs(examples["text"], codes)


def encode_images(model: ImageTokenizer, images: Tensor, batch_size: int = 16) -> Iterator[Tensor]:
    """Yield codes, on the CPU, of images [B, 3, H, W] in bytes, a batch at a time."""
    device = _device_of(model)
    for part in images.split(batch_size):
        with inference(device):
            yield model.encode(to_float(part).to(device)).cpu()


def _prepare(
    tokenizer: Tokenizer,
    text_len: int,
    size: int,
    allow_upscale: bool,
    sample: Sample,
    rng: random.Random,
) -> Example:
    text = tokenizer.encode([sample.caption(rng)], text_len)[0]
    if isinstance(sample, CodeSample):
        return {"text": text, "codes": sample.codes(rng)}
    image = centre_square(sample.image(), size, allow_upscale)
    return {"text": text, "images": to_tensor(image)}


def _device_of(model: object) -> torch.device:
    """Return the device of a module's parameters; the CPU for what has no parameters."""
    if isinstance(model, torch.nn.Module):
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu")
