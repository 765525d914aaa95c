"""Train a CLIP, which scores how well an image fits a caption (paper §2.6).

    dalle1 train clip small --data toybox --out runs/clip

writes runs/clip/latest/ in Hugging Face's format, and a log. The same command resumes after an
interruption. Any other CLIPModel or SiglipModel serves for reranking, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dalle1.clip import Clip, ClipArch, ContrastiveLoss, new_clip, pair_loss, random_blur
from dalle1.clip.hard_negatives import HardNegatives
from dalle1.clip.loading import clip_folder
from dalle1.clip.losses import Kind as ContrastiveKind
from dalle1.clip.losses import prepare_for
from dalle1.console import one_line_errors, parse_preset
from dalle1.data import (
    Example,
    ReadOptions,
    Sample,
    Source,
    first_captions,
    first_examples,
    open_source,
    warn_of_cut_captions,
)
from dalle1.data.crops import RANDOM_SQUARE, Augmentation, augmented, refuse_small
from dalle1.data.examples import MEASURED_CAPTIONS
from dalle1.data.images import to_float, to_tensor
from dalle1.text.bpe import Tokenizer
from dalle1.toybox.exchangeable import WORD_CLASSES, adds_held_out_pair
from dalle1.training import distributed
from dalle1.training.config import TrainConfig, resolve_precision
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit, train_loader
from dalle1.training.resume_key import contents_of
from dalle1.training.shared_folder import shared_checkpoint
from dalle1.training.task import Task


@dataclass(frozen=True, kw_only=True)
class ClipTrainConfig(TrainConfig):
    """Settings of a CLIP's training (Radford et al. 2021, arXiv 2103.00020)."""

    model: ClipArch = field(default_factory=ClipArch)
    """Architecture of the CLIP."""
    init: str | None = None
    """Folder or Hugging Face name of a CLIP of the same architecture to fine-tune; its vocabulary
    is kept."""
    loss: ContrastiveKind = "infonce"
    """Contrastive loss: infonce as in CLIP, or sigmoid as in SigLIP, with a learned bias."""
    encode_at_once: int | None = None
    """Gradient caching: number of pairs whose activations are in memory at once. It takes a third
    more computation. Unlike --accumulate, the loss still compares the whole batch."""
    hard_negatives: str | None = None
    """Text file with words that exclude each other, a class per line, separated by commas; "toybox"
    has Toybox's words. Each image is also compared with its caption after two words of a class are
    exchanged, or one is replaced (NegCLIP). None: no such captions."""
    augmentation: Augmentation = RANDOM_SQUARE
    """Random crops of the training images."""
    random_blur: bool = False
    """Whether half of the images are blurred slightly, as reconstructions are. Paper: no."""
    vocab_size: int = 1024
    """Maximum number of BPE tokens, learned from the data."""
    vocab_captions: int = 20_000
    """Number of captions that the BPE is learned from, the first of the data."""
    validation_pairs: int = 256
    """Maximum number of validation pairs, among which retrieval is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_pairs < 1:
            raise ValueError(f"validation_pairs is {self.validation_pairs}, expected at least 1")
        if self.encode_at_once is not None and self.encode_at_once < 1:
            raise ValueError(f"encode_at_once is {self.encode_at_once}, expected at least 1")
        if self.loss not in get_args(ContrastiveKind):
            raise ValueError(f"loss is {self.loss!r}, expected infonce or sigmoid")


def _clip_of_the_paper(learning_rate: float, beta2: float, **size: Any) -> ClipTrainConfig:
    # Radford et al. 2021, tables 18 to 20: 32 epochs of 400 million pairs.
    common: dict[str, Any] = {"image_size": 224, "text_width": 512, "text_layers": 12}
    common |= {"text_len": 77, "head_dim": 64, "activation": "quick_gelu"}
    return ClipTrainConfig(
        out=Path("runs/clip"),
        model=ClipArch(**{**common, **size}),
        steps=390_625,
        batch_size=32_768,
        learning_rate=learning_rate,
        final_learning_rate=0.0,
        warmup_steps=2_000,
        weight_decay=0.2,
        beta2=beta2,
        ema_decay=0.0,
        vocab_size=49_152,
        vocab_captions=10_000_000,
        validation_pairs=512,
    )


# The modified ResNet, which learns Toybox in a fraction of a ViT's time: in 50 minutes of one core
# it found the noun of 98.7 % of training pairs, the fill of 99.5 %, when Toybox had 23 nouns.
_clip_small = ClipTrainConfig(
    out=Path("runs/clip"),
    model=ClipArch(image_size=96, patch_size=None, layers=(1, 1, 1, 1), width=16, text_len=24),
    steps=6_000,
    batch_size=128,
    learning_rate=3e-3,
    ema_decay=0.99,
)

CLIP_PRESETS: dict[str, ClipTrainConfig] = {
    "toy": replace(
        _clip_small,
        model=replace(_clip_small.model, image_size=128, width=24, text_len=64),
        random_blur=True,
    ),
    "small": _clip_small,
    "rn50": _clip_of_the_paper(
        5e-4, 0.999, patch_size=None, layers=(3, 4, 6, 3), width=64, embed_dim=1024
    ),
    "vit-b-32": _clip_of_the_paper(5e-4, 0.98, patch_size=32, layers=12, width=768, embed_dim=512),
    "vit-b-16": _clip_of_the_paper(5e-4, 0.98, patch_size=16, layers=12, width=768, embed_dim=512),
    "vit-l-14": _clip_of_the_paper(
        4e-4, 0.98, patch_size=14, layers=24, width=1024, embed_dim=768, text_width=768
    ),
}


def example(
    config: ClipTrainConfig,
    tokenizer: Any,
    negatives: HardNegatives | None,
    sample: Sample,
    rng: random.Random,
) -> Example:
    """Cut a square out of an image, uint8, and prepare the tokens of a caption."""
    caption = sample.caption(rng)
    size, upscale = config.model.image_size, config.allow_upscale
    image = augmented(sample.image(), size, rng, config.augmentation, upscale)
    ids = {"input_ids": tokens(config, tokenizer, caption)}
    if negatives is not None:
        ids["hard_ids"] = tokens(config, tokenizer, negatives(caption, rng) or caption)
    return {"images": to_tensor(image), **ids}


def held_example(
    config: ClipTrainConfig, clip: Clip, sample: Sample, rng: random.Random
) -> Example:
    """Prepare an image to validate on as any user of the CLIP will, and a caption's tokens."""
    ids = tokens(config, clip.tokenizer, sample.caption(rng))
    image = sample.image()
    refuse_small(image, config.model.image_size, config.allow_upscale)
    return {"images": clip.preprocess([image])[0], "input_ids": ids}


def hard_negatives(name: str | None) -> HardNegatives | None:
    """Return the hard negatives of a file of words, or of Toybox."""
    if name is None:
        return None
    if name == "toybox":
        return HardNegatives(WORD_CLASSES, adds_held_out_pair)
    return HardNegatives.read(Path(name))


def tokens(config: ClipTrainConfig, tokenizer: Any, caption: str) -> Tensor:
    """Return the tokens of a caption, cut or padded to the model's length: [T]."""
    how = {"truncation": True, "max_length": config.model.text_len, "padding": "max_length"}
    return torch.tensor(tokenizer(caption, **how)["input_ids"])


class ClipTask(Task[nn.Module]):
    """Trains a CLIP."""

    def __init__(self, config: ClipTrainConfig) -> None:
        from dalle1.clip.towers import fast_attention

        self.device = distributed.init(config.device)
        self.config = config = resolve_precision(config, self.device)
        size = config.model.image_size
        options = ReadOptions(size=size, seed=config.seed, cleaning=config, decode_size=size)
        source, held = (open_source(config.data, s, options) for s in ("train", "validation"))
        torch.manual_seed(config.seed)
        self.clip = self.initial(source)
        prepare_for(self.clip.model, config.loss)
        self.model = self.clip.model.train().requires_grad_(True).to(self.device)
        fast_attention(self.model, self.device)
        negatives = hard_negatives(config.hard_negatives)
        prepare = partial(example, config, self.clip.tokenizer, negatives)
        self.loader = train_loader(source, prepare, config)
        init = clip_folder(config.init) / "model.safetensors" if config.init else None
        words = Path(config.hard_negatives) if config.hard_negatives else None
        find = partial(contents_of, source, init=init, hard_negatives=words)
        self.contents = distributed.broadcast_from_main(find)
        as_used = partial(held_example, config, self.clip)
        first = partial(first_examples, held, as_used, config.validation_pairs)
        pairs = distributed.broadcast_from_main(first)
        self.held = {name: tensor.to(self.device) for name, tensor in pairs.items()}

    def initial(self, source: Source) -> Clip:
        """Return a new CLIP with a vocabulary of the data's captions, or the one of --init.

        A resumed training keeps its vocabulary, even if the data has changed.
        """
        config = self.config
        found = shared_checkpoint(config.out)
        if config.init is None and found is not None:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(found.folder)
            return new_clip(tokenizer, config.model)
        captions = []
        if found is None:
            count = config.vocab_captions if config.init is None else MEASURED_CAPTIONS
            first = partial(first_captions, source, count)
            captions = distributed.broadcast_from_main(first)
        if config.init is None:
            clip = new_clip(Tokenizer.train(captions, config.vocab_size), config.model)
        else:
            clip = Clip.from_pretrained(config.init)
            if (changed := clip.arch().differences(config.model)) is not None:
                raise ValueError(
                    f"the CLIP in {config.init} has another architecture; add {changed}"
                )
        if captions and distributed.is_main():
            warn_of_cut_captions(
                captions,
                config.model.text_len,
                lambda caption: len(clip.tokenizer(caption, verbose=False)["input_ids"]),
            )
        return clip

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[ContrastiveLoss]:
        config, images = self.config, to_float(batch["images"])
        if config.random_blur:
            images = random_blur(images, rng)
        ids = {name: batch[name] for name in ("input_ids", "hard_ids") if name in batch}
        length = max(self.length(tokens) for tokens in ids.values())
        loss = pair_loss(
            self.model,
            self.clip.normalise(images),
            **{name: tokens[:, :length] for name, tokens in ids.items()},
            kind=config.loss,
            at_once=config.encode_at_once,
            gather=distributed.gather,
        )
        return [loss]

    def trimmed(self, ids: Tensor) -> Tensor:
        """Cut off the columns after the last caption's end, to which no earlier one attends."""
        return ids[:, : self.length(ids)]

    def length(self, ids: Tensor) -> int:
        """Return the number of columns up to the last caption's end."""
        ends = (ids == self.clip.tokenizer.eos_token_id).int().argmax(1)
        return int(ends.max()) + 1

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        ids, at_once = self.trimmed(self.held["input_ids"]), self.config.encode_at_once
        images, kind = self.held["images"], self.config.loss
        loss = pair_loss(model, images, ids, kind=kind, at_once=at_once)
        yield "retrieval", float(loss.accuracy)
        yield "loss", float(loss.total)

    def save(self, model: nn.Module, folder: Path) -> None:
        whole = Clip(model, self.clip.tokenizer, self.clip.processor)  # type: ignore[arg-type]
        whole.save_pretrained(folder, dtype=torch.float16)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(CLIP_PRESETS, args, __doc__.splitlines()[0])
        train(config)
        if distributed.is_main():
            print(f"The CLIP is in {config.out}")


def train(config: ClipTrainConfig) -> nn.Module:
    """Train a CLIP, or resume the training in `config.out`; return the averaged model."""
    with graceful_run(config):
        return fit(ClipTask(config), config)
