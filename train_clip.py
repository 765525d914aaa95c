"""Train a CLIP, which tells which of some pictures fits a caption best (paper §2.6).

    python train_clip.py small --data toybox --out runs/clip

writes runs/clip/latest/ in Hugging Face's format, and a log; the same command goes on after an
interruption. Presets are in dalle1/tasks/presets.py. Any other CLIPModel or SiglipModel serves for
reranking, too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dalle1.clip import Clip, ContrastiveLoss, new_clip, pair_loss, random_blur
from dalle1.clip.losses import prepare_for
from dalle1.console import one_line_errors, parse_preset
from dalle1.data import PairSource, open_source
from dalle1.data.images import augmented, refuse_small, to_float, to_tensor
from dalle1.data.loader import Example, Source, first_captions, first_examples
from dalle1.storage import model_folder
from dalle1.tasks.presets import CLIP_PRESETS, ClipTrainConfig
from dalle1.text.bpe import Tokenizer
from dalle1.training import distributed
from dalle1.training.interrupts import training
from dalle1.training.loop import fit, stream_from
from dalle1.training.trainer import Batch


def example(
    config: ClipTrainConfig, tokenizer: Any, source: PairSource, index: int, rng: random.Random
) -> Example:
    """Cut a square out of a picture, uint8, and prepare the tokens of a caption."""
    ids = tokens(config, tokenizer, source.caption(index, rng))
    size, upscale = config.model.image_size, config.allow_upscale
    picture = augmented(source.image(index), size, rng, config.augmentation, upscale)
    return {"images": to_tensor(picture), "input_ids": ids}


def held_example(
    config: ClipTrainConfig, clip: Clip, source: PairSource, index: int, rng: random.Random
) -> Example:
    """Prepare a picture to validate on as any user of the CLIP will, and a caption's tokens."""
    ids = tokens(config, clip.tokenizer, source.caption(index, rng))
    picture = source.image(index)
    refuse_small(picture, config.model.image_size, config.allow_upscale)
    return {"images": clip.preprocess([picture])[0], "input_ids": ids}


def tokens(config: ClipTrainConfig, tokenizer: Any, caption: str) -> Tensor:
    """Give the tokens of a caption, cut or padded to the model's length: [T]."""
    how = {"truncation": True, "max_length": config.model.text_len, "padding": "max_length"}
    return torch.tensor(tokenizer(caption, **how)["input_ids"])


class ClipTraining:
    """What `fit` needs to know of a CLIP."""

    def __init__(self, config: ClipTrainConfig) -> None:
        from dalle1.clip.towers import fast_attention

        self.config = config
        self.device = distributed.start(config.device)
        size = config.model.image_size
        how: dict[str, Any] = {"size": size, "seed": config.seed, "reading": config, "detail": size}
        source, held = (open_source(config.data, split, **how) for split in ("train", "validation"))
        torch.manual_seed(config.seed)
        self.clip = self.initial(source)
        prepare_for(self.clip.model, config.loss)
        self.model = self.clip.model.train().requires_grad_(True).to(self.device)
        fast_attention(self.model, self.device)
        prepare = partial(example, config, self.clip.tokenizer)
        self.stream = stream_from(source, prepare, config)
        as_used = partial(held_example, config, self.clip)
        first = partial(first_examples, held, as_used, config.validation_pairs)
        pairs = distributed.broadcast_from_main(first)
        self.held = {name: tensor.to(self.device) for name, tensor in pairs.items()}

    def initial(self, source: Source) -> Clip:
        """Make a new CLIP with a vocabulary of the data's captions, or take --init's.

        A training that goes on keeps the vocabulary that it has, whatever became of the data.
        """
        config = self.config
        if config.init is None:
            if (kept := model_folder(config.out) / "tokenizer.json").is_file():
                return new_clip(PreTrainedTokenizerFast.from_pretrained(kept.parent), config.model)
            captions = distributed.broadcast_from_main(
                partial(first_captions, source, config.vocab_captions)
            )
            return new_clip(Tokenizer.train(captions, config.vocab_size), config.model)
        clip = Clip.from_pretrained(config.init)
        if (changed := clip.size().differences(config.model)) is not None:
            raise ValueError(f"the CLIP in {config.init} is of another size; add {changed}")
        return clip

    def loss(
        self, model: nn.Module, batch: Batch, step: int, generator: torch.Generator
    ) -> ContrastiveLoss:
        config, images = self.config, to_float(batch["images"])
        if config.soften:
            images = random_blur(images, generator)
        return pair_loss(
            model,
            self.clip.normalise(images),
            self.trimmed(batch["input_ids"]),
            kind=config.loss,
            at_once=config.encode_at_once,
            gather=distributed.gather,
        )

    def trimmed(self, ids: Tensor) -> Tensor:
        """Cut off the columns after the last caption's end, which no place before them sees."""
        ends = (ids == self.clip.tokenizer.eos_token_id).int().argmax(1)
        return ids[:, : int(ends.max()) + 1]

    @torch.inference_mode()
    def validate(self, model: nn.Module, step: int) -> Mapping[str, float]:
        ids, at_once = self.trimmed(self.held["input_ids"]), self.config.encode_at_once
        images, kind = self.held["images"], self.config.loss
        loss = pair_loss(model, images, ids, kind=kind, at_once=at_once)
        return {"retrieval": float(loss.accuracy), "loss": float(loss.total)}

    def save(self, model: nn.Module, folder: Path) -> None:
        whole = Clip(model, self.clip.tokenizer, self.clip.processor)  # type: ignore[arg-type]
        whole.save_pretrained(folder, dtype=torch.float16)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        train(parse_preset(CLIP_PRESETS, args, __doc__.splitlines()[0]))


def train(config: ClipTrainConfig) -> nn.Module:
    """Train as `config` says, resuming what is in `config.out`; give the averaged model."""
    with training(config):
        run = ClipTraining(config)
        how: dict[str, Any] = {"save_model": run.save, "validate": run.validate}
        return fit(run.model, run.loss, run.stream, config, **how)


if __name__ == "__main__":
    main()
