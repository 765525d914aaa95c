"""Train a small CLIP that tells which of some pictures fits a caption best (paper §2.6).

    python train_clip.py toy --data toybox --out runs/clip

writes runs/clip/latest/ in Hugging Face's format, and a log; the same command goes on after an
interruption. Any other CLIPModel or SiglipModel serves for reranking, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle1.cli import clear_errors, parse_preset
from dalle1.clip import Clip, ContrastiveLoss, normalise, pair_loss, soften, tiny_clip
from dalle1.data import PairSource, batches, open_source
from dalle1.data.images import centre_square, to_float, to_tensor
from dalle1.device import pick_device
from dalle1.text import Tokenizer
from dalle1.training.loop import Batch, RunConfig, fit, step_generator


@dataclass(frozen=True, kw_only=True)
class ClipRecipe(RunConfig):
    """How a small CLIP is trained."""

    image_size: int = 128
    """Side in pixels of the pictures that it reads."""
    vocab_size: int = 1024
    """BPE tokens at most."""
    vocab_captions: int = 20_000
    """Captions that they are learned from: the first of the data."""
    validation_pairs: int = 256  # among which retrieval is measured


_toy = ClipRecipe(out=Path("runs/clip"), steps=1_800, batch_size=128, ema_decay=0.99)
CLIP_PRESETS = {"toy": _toy}


def main(args: Sequence[str] | None = None) -> None:
    with clear_errors():
        train(parse_preset(CLIP_PRESETS, args, __doc__.splitlines()[0]))


def train(config: ClipRecipe) -> nn.Module:
    """Train as `config` says, resuming what is in `config.out`; give the averaged model."""
    device = pick_device(config.device)
    size = config.image_size
    source = open_source(config.data, "train", size, config.seed)
    held = open_source(config.data, "validation", size, config.seed)
    count = min(config.vocab_captions, len(source))
    captions = (source.caption(i, random.Random(i)) for i in range(count))
    tokenizer = Tokenizer.train(captions, config.vocab_size)
    torch.manual_seed(config.seed)
    clip = tiny_clip(tokenizer, image_size=size)

    def prepare(source: PairSource, index: int, rng: random.Random) -> Mapping[str, Tensor]:
        picture = to_tensor(centre_square(source.image(index), size))
        text = clip.tokenize([source.caption(index, rng)], full_length=True)
        return {"images": picture, "input_ids": text["input_ids"][0]}

    def stream(start: int) -> Iterator[Batch]:
        return batches(
            source,
            prepare,
            batch_size=config.batch_size,
            seed=config.seed,
            start=start,
            num_workers=config.num_workers,
        )

    def loss_fn(model: nn.Module, batch: Batch, step: int) -> ContrastiveLoss:
        images = to_float(batch["images"])
        softened = soften(images, step_generator(config.seed, step, images.device))
        return pair_loss(model, normalise(softened), batch["input_ids"])

    pairs = [prepare(held, i, random.Random(i)) for i in range(config.validation_pairs)]
    validation = {name: torch.stack([pair[name] for pair in pairs]).to(device) for name in pairs[0]}

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
