"""Train a transformer on captions and codes as one stream (stage 2; paper §2.2, B).

    dalle1 train transformer small --dvae runs/dvae --data toybox --out runs/transformer

writes runs/transformer/latest/, which `dalle1 sample --model` reads, a log and samples. The same
command resumes after an interruption. Data may be encoded before, by `dalle1 encode`.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle1.console import command_line, one_line_errors, parse_preset
from dalle1.data import (
    ReadOptions,
    Source,
    first_captions,
    first_examples,
    open_source,
    warn_of_cut_captions,
)
from dalle1.data.codes import open_codes
from dalle1.data.crops import Augmentation, augmented, centre_square
from dalle1.data.images import grid, save_png, to_float, to_tensor
from dalle1.data.spec import data_name
from dalle1.devices import autocast
from dalle1.image_tokenizer import image_tokenizer_file, load_image_tokenizer, require_dvae
from dalle1.model.lora import plain_name
from dalle1.model.transformer import (
    Transformer,
    TransformerConfig,
    TransformerLoss,
)
from dalle1.model_card import ModelInfo
from dalle1.pipeline import VOCABULARY_NAME, DallE
from dalle1.sampling.generation import GenerationConfig
from dalle1.storage import model_folder, same_tensors
from dalle1.tasks.transformer_config import TRANSFORMER_PRESETS, TransformerTrainConfig
from dalle1.text.bpe import Tokenizer
from dalle1.text.known_words import Words
from dalle1.training import distributed, resblocks
from dalle1.training.config import resolve_precision
from dalle1.training.engines.deepspeed import partitioned
from dalle1.training.fine_tuning import prepare_fine_tuning, training_flops
from dalle1.training.interrupts import graceful_run
from dalle1.training.loop import fit, train_loader
from dalle1.training.resume_key import contents_of
from dalle1.training.shared_folder import shared_checkpoint
from dalle1.training.task import SampleCost, Task


@dataclass(frozen=True)
class Tokenized:
    """Prepares one example: a caption's tokens, and the image or its codes."""

    size: int
    tokenizer: Tokenizer
    text_len: int
    bpe_dropout: float
    caption_dropout: float
    augmentation: Augmentation | None
    allow_upscale: bool
    encoded: bool
    """Whether samples hold codes instead of images."""

    def __call__(self, sample: Any, rng: random.Random) -> Mapping[str, Tensor]:
        caption = sample.caption(rng)
        if rng.random() < self.caption_dropout:
            caption = ""
        text = self.tokenizer.encode([caption], self.text_len, dropout=self.bpe_dropout, rng=rng)[0]
        if self.encoded:
            return {"text": text, "codes": sample.codes(rng)}
        if self.augmentation is None:
            image = centre_square(sample.image(), self.size, self.allow_upscale)
        else:
            how = self.augmentation, self.allow_upscale
            image = augmented(sample.image(), self.size, rng, *how)
        return {"text": text, "images": to_tensor(image)}


class TransformerTask(Task[Transformer]):
    """Trains a transformer (stage 2)."""

    def __init__(self, config: TransformerTrainConfig) -> None:
        self.device = distributed.init(config.device)
        config = resolve_precision(config, self.device)
        if config.init is not None and (config.lora is not None or config.train_only):
            config = replace(config, model=Transformer.config_of(config.init).arch)
        self.config = config
        self.dvae = load_image_tokenizer(config.dvae, self.device, config.image_size)
        init = model_folder(config.init) if config.init else None
        before = ModelInfo.load(init) if init else ModelInfo()
        self.info = before.fine_tuned(data_name(config.data), config.batch_size)
        self.generation = GenerationConfig.load(init) if init else GenerationConfig()
        self.source, encoded = self.open("train")
        if config.sample_codes:
            require_dvae(self.dvae, config.dvae)
            if encoded:
                raise ValueError(
                    f"--sample-codes samples codes of images, and {config.data} holds codes; pass "
                    "it to `dalle1 encode` instead"
                )
        self.tokenizer = self.vocabulary()
        size, text_len = self.dvae.image_size, config.model.text_len
        prepare = Tokenized(
            size, self.tokenizer, text_len, 0.0, 0.0, None, config.allow_upscale, encoded
        )
        first = partial(first_examples, self.open("validation")[0], prepare, 256)
        held = distributed.broadcast_from_main(first)
        self.held = {name: tensor.to(self.device) for name, tensor in held.items()}
        prepare = replace(
            prepare,
            bpe_dropout=config.bpe_dropout,
            caption_dropout=config.caption_dropout,
            augmentation=config.augmentation,
        )
        self.loader = train_loader(self.source, prepare, config)
        torch.manual_seed(config.seed)
        self.model = prepare_fine_tuning(self.initial(), config).to(self.device)
        self.initial_weights = config.init and Transformer.file_in(config.init)
        files = {"dvae": image_tokenizer_file(config.dvae), "init": self.initial_weights}
        self.contents = distributed.broadcast_from_main(partial(contents_of, self.source, **files))
        self.cost = SampleCost(tokens=self.model.config.length, flops=training_flops(self.model))
        self.scaler = resblocks.prepare(
            self.model,
            checkpointing=config.checkpointing,
            scaling=config.precision == "fp16",
        )
        if config.compile:
            for layer in self.model.layers:
                layer.compile()

    def initial(self) -> Transformer:
        """Return a new transformer, after checking that the one of --init has its architecture.

        With rotary positions, no parameter depends on the image size: the grid may change, and the
        angles are then interpolated. Of the text positions, only padding tokens depend.
        """
        sizes = {
            **asdict(self.config.model),
            "text_vocab": self.tokenizer.vocab_size,
            "codebook_size": self.dvae.codebook_size,
            "grid_size": self.dvae.grid_size,
        }
        wanted = TransformerConfig(**sizes)
        if self.config.init is not None:
            before = Transformer.config_of(self.config.init)
            if wanted.positions == before.positions == "rotary":
                base_grid = before.rotary_grid or before.grid_size
                wanted = replace(wanted, rotary_grid=base_grid)
                before = replace(before, rotary_grid=base_grid, grid_size=wanted.grid_size)
                before = replace(before, text_len=min(before.text_len, wanted.text_len))
            found, named = asdict(before), asdict(wanted)
            if other := [f"{k} is {found[k]}, not {v}" for k, v in named.items() if found[k] != v]:
                raise ValueError(
                    f"the transformer in {self.config.init} differs: {'; '.join(other)}"
                )
            folders = self.config.init, self.config.dvae
            compare = partial(same_tensors, *map(image_tokenizer_file, folders))
            if not distributed.broadcast_from_main(compare) and distributed.is_main():
                warnings.warn(
                    f"{folders[0]} was trained on codes of another dVAE than {folders[1]}: the "
                    "meaning of the codes has to be learned again",
                    stacklevel=2,
                )
        with partitioned(self.config):
            return Transformer(wanted)

    def initial_name(self, name: str) -> str | None:
        return plain_name(name)

    def initial_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Cut the padding tokens of text positions that the model does not have."""
        config = self.model.config
        tokens = config.text_vocab + config.text_len
        if name == "text_embedding.weight":
            return torch.cat([tensor[:tokens], tensor[-1:]])  # the last is the start token
        return tensor[:tokens] if name.startswith("text_head.") else tensor

    def vocabulary(self) -> Tokenizer:
        """Learn the BPE from the data; a resumed training keeps its own."""
        if (found := shared_checkpoint(self.config.out)) is not None:
            return Tokenizer.load(found.folder / VOCABULARY_NAME)
        first = partial(first_captions, self.source, self.config.vocab_captions)
        captions = distributed.broadcast_from_main(first)
        if self.config.init is None:
            tokenizer = Tokenizer.train(captions, self.config.model.text_vocab)
        else:
            tokenizer = Tokenizer.load(model_folder(self.config.init) / VOCABULARY_NAME)
            if tokenizer.words is not None:  # words of the fine-tuning data are known, too
                tokenizer.words = tokenizer.words.merged(Words.of(captions))
        limit = tokenizer.format.limit(self.config.model.text_len)
        if distributed.is_main():
            warn_of_cut_captions(captions, limit, tokenizer.count)
        return tokenizer

    def open(self, split: str) -> tuple[Source, bool]:
        """Open a split of the data; also return whether it holds codes instead of images."""
        config, size = self.config, self.dvae.image_size
        codes = open_codes(config.data, split, config.dvae, self.dvae)
        if codes is not None:
            return codes, True
        decode_size = math.ceil(size * config.augmentation.resize[1])
        options = ReadOptions(size=size, seed=config.seed, cleaning=config, decode_size=decode_size)
        return open_source(config.data, split, options), False

    def losses(
        self, batch: Mapping[str, Tensor], step: int, rng: torch.Generator
    ) -> Sequence[TransformerLoss]:
        if self.config.sample_codes:
            dvae = require_dvae(self.dvae, self.config.dvae)
            batch = {**batch, "codes": dvae.sample_codes(to_float(batch["images"]), rng)}
        return [self.loss(self.model, batch)]

    def loss(self, model: Transformer, batch: Mapping[str, Tensor]) -> TransformerLoss:
        """Compute the loss on a batch of text, and codes or images."""
        codes = batch["codes"] if "codes" in batch else self.dvae.encode(to_float(batch["images"]))
        return model.loss(batch["text"], codes, self.config.text_weight)

    def validate(self, model: Transformer) -> Iterator[tuple[str, float]]:
        """Yield the losses on the validation pairs, in nats and in bits, and the caption gap.

        The gap is the loss of an image after another pair's caption, minus that after its own, in
        nats per image: what the model reads in captions.
        """
        own = self._held_losses(model, self.held)
        other = self._held_losses(model, {**self.held, "text": self.held["text"].roll(1, 0)})
        yield from own.items()
        bits = {f"{name}_bits": value / math.log(2) for name, value in own.items()}
        yield from bits.items()
        yield "bits_per_image", bits["image_bits"] * model.config.image_len
        yield "caption_gap", (other["image"] - own["image"]) * model.config.image_len

    def _held_losses(self, model: Transformer, held: Mapping[str, Tensor]) -> dict[str, float]:
        sums = {"text": 0.0, "image": 0.0}
        count = len(held["text"])
        for start in range(0, count, 32):
            batch = {name: tensor[start : start + 32] for name, tensor in held.items()}
            with autocast(self.device, self.config.precision):
                loss = self.loss(model, batch)
            for name in sums:
                sums[name] += float(getattr(loss, name)) * len(batch["text"]) / count
        return sums

    def sample(self, model: Transformer, path: Path) -> None:
        """Write eight candidates of each prompt, a row per prompt."""
        pipeline = DallE(self.dvae, model, self.tokenizer)
        rows = [pipeline.candidates(p, num_candidates=8, seed=0) for p in self.config.prompts]
        save_png(grid([c.image for row in rows for c in row], 8), path)

    def save(self, model: Transformer, folder: Path) -> None:
        DallE(
            self.dvae,
            model,
            self.tokenizer,
            info=self.info,
            generation=self.generation,
        ).save_pretrained(folder)


def with_architecture_of_init(
    config: TransformerTrainConfig, words: Sequence[str]
) -> TransformerTrainConfig:
    """Replace the architecture of a preset by that of --init, where the two differ.

    Args:
        words: the command line; its --model flags are kept, and refused where they do not fit.
    """
    if config.init is None:
        return config
    found = Transformer.config_of(config.init).arch
    rotary = found.positions == config.model.positions == "rotary"
    free = ("text_vocab", "text_len") if rotary else ("text_vocab",)
    if replace(found, **{name: getattr(config.model, name) for name in free}) == config.model:
        return config
    flags = (word.partition("=")[0] for word in words if word.startswith("--model."))
    named = {flag.removeprefix("--model.").removeprefix("no-").replace("-", "_") for flag in flags}
    kept = {name: x for name, x in vars(config.model).items() if name in named}
    if config.lora is None and not config.train_only:
        return replace(config, model=replace(found, **kept))
    for name, value in kept.items():
        if value != (expected := getattr(found, name)):
            raise ValueError(
                f"--model.{name.replace('_', '-')} is {value}, expected {expected}, as in --init, "
                "whose architecture --lora and --train-only keep"
            )
    return config  # the task takes the architecture of --init


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse_preset(TRANSFORMER_PRESETS, args, __doc__.splitlines()[0])
        config = with_architecture_of_init(config, command_line(args))
        with graceful_run(config):
            fit(TransformerTask(config), config)
        if distributed.is_main():
            command = f"dalle1 sample PROMPT --model {config.out}"
            print(f"The model is in {config.out}; sample with: {command}")
