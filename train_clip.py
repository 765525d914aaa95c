"""Train a small CLIP that tells which of some pictures fits a caption best (paper §2.6).

    python train_clip.py toy --data toybox --out runs/clip

writes runs/clip/latest/ in Hugging Face's format, and a log; the same command goes on after an
interruption. Any other CLIPModel or SiglipModel serves for reranking, too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle1.cli import clear_errors, parse_preset
from dalle1.clip import Clip, ContrastiveLoss, normalise, pair_loss, soften, tiny_clip
from dalle1.data import PairSource, open_source
from dalle1.data.batches import first_captions, first_examples
from dalle1.data.images import centre_square, to_float, to_tensor
from dalle1.presets import CLIP_PRESETS, ClipRecipe
from dalle1.text import Tokenizer
from dalle1.training import distributed
from dalle1.training.loop import fit, stream_from
from dalle1.training.trainer import Batch


def tokenized(
    tokenizer: Any,
    text_len: int,
    size: int,
    allow_upscale: bool,
    source: PairSource,
    index: int,
    rng: random.Random,
) -> Mapping[str, Tensor]:
    """Prepare one example: a picture, and the tokens of a caption, cut or padded to `text_len`."""
    ids = tokenizer(
        source.caption(index, rng), truncation=True, max_length=text_len, padding="max_length"
    )["input_ids"]
    picture = to_tensor(centre_square(source.image(index), size, allow_upscale))
    return {"images": picture, "input_ids": torch.tensor(ids)}


def main(args: Sequence[str] | None = None) -> None:
    with clear_errors():
        train(parse_preset(CLIP_PRESETS, args, __doc__.splitlines()[0]))


def train(config: ClipRecipe) -> nn.Module:
    """Train as `config` says, resuming what is in `config.out`; give the averaged model."""
    device = distributed.start(config.device)
    size = config.image_size
    how: dict[str, Any] = {"size": size, "seed": config.seed, "reading": config, "detail": size}
    source, held = (open_source(config.data, split, **how) for split in ("train", "validation"))
    captions = first_captions(source, config.vocab_captions)
    tokenizer = Tokenizer.train(captions, config.vocab_size)
    torch.manual_seed(config.seed)
    clip = tiny_clip(tokenizer, image_size=size)

    prepare = partial(tokenized, clip.tokenizer, clip.text_len, size, config.allow_upscale)
    stream = stream_from(source, prepare, config)

    def loss_fn(
        model: nn.Module, batch: Batch, step: int, generator: torch.Generator
    ) -> ContrastiveLoss:
        softened = soften(to_float(batch["images"]), generator)
        return pair_loss(model, normalise(softened), batch["input_ids"])

    pairs = first_examples(held, prepare, config.validation_pairs)
    validation = {name: tensor.to(device) for name, tensor in pairs.items()}

    @torch.inference_mode()
    def validate(model: nn.Module, step: int) -> Mapping[str, float]:
        images = normalise(to_float(validation["images"]))
        loss = pair_loss(model, images, validation["input_ids"])
        return {"retrieval": float(loss.accuracy), "loss": float(loss.total)}

    def save(model: nn.Module, folder: Path) -> None:
        Clip(model, clip.tokenizer, clip.processor).save_pretrained(folder, dtype=torch.float16)

    return fit(clip.model.to(device), loss_fn, stream, config, save_model=save, validate=validate)


if __name__ == "__main__":
    main()
