"""Train a transformer on captions and codes as one stream (stage 2; paper §2.2, B).

    python train_transformer.py toy --dvae runs/dvae --data toybox --out runs/transformer

writes runs/transformer/latest/, which `sample.py --model` takes as it is, a log and samples; the
same command goes on after an interruption. Data may be pre-encoded (`python -m dalle1.data.codes`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dalle1.cli import clear_errors, parse_preset
from dalle1.data import PairSource, batches, open_source
from dalle1.data.codes import CodeSource, open_codes
from dalle1.data.images import centre_square, grid, to_float, to_tensor
from dalle1.device import autocast, pick_device
from dalle1.pipeline import VOCABULARY_NAME, DallE
from dalle1.presets import TRANSFORMER_PRESETS, TransformerRecipe
from dalle1.text import Tokenizer
from dalle1.training.loop import Batch, fit, stream_from
from dalle1.transformer import Transformer, TransformerLoss
from dvae import DVAE
from dvae.weights import model_folder

Source = CodeSource | PairSource


def tokenized(
    size: int,
    tokenizer: Tokenizer,
    text_len: int,
    source: Source,
    index: int,
    rng: random.Random,
    dropout: float = 0.0,
) -> Mapping[str, Tensor]:
    """Prepare one example: a caption's tokens, and the picture or its codes."""
    text = tokenizer.encode([source.caption(index, rng)], text_len, dropout=dropout, rng=rng)[0]
    if isinstance(source, CodeSource):
        return {"text": text, "codes": source.code_grid(index)}
    return {"text": text, "images": to_tensor(centre_square(source.image(index), size))}


class TransformerTraining:
    """What `fit` needs to know of stage 2."""

    def __init__(self, config: TransformerRecipe) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.dvae = DVAE.load(config.dvae, self.device)
        self.source, self.held = self.open("train"), self.open("validation")
        self.tokenizer = self.vocabulary()
        size = self.dvae.config.image_size
        self.prepare = partial(tokenized, size, self.tokenizer, config.text_len)
        prepare = partial(self.prepare, dropout=config.bpe_dropout)
        self.stream = stream_from(self.source, prepare, config)
        torch.manual_seed(config.seed)
        sizes = self.dvae.vocab_size, self.dvae.grid_size, self.tokenizer.vocab_size
        self.model = Transformer(config.size(*sizes)).to(self.device)

    def vocabulary(self) -> Tokenizer:
        """Learn the BPE from the data; a training that goes on keeps the one that it has."""
        kept = model_folder(self.config.out) / VOCABULARY_NAME
        if kept.is_file():
            return Tokenizer.load(kept)
        count = min(self.config.vocab_captions, len(self.source))
        captions = (self.source.caption(i, random.Random(i)) for i in range(count))
        return Tokenizer.train(captions, self.config.text_vocab)

    def open(self, split: str) -> Source:
        config = self.config
        return open_codes(config.data, split, config.dvae) or open_source(
            config.data, split, self.dvae.config.image_size, config.seed
        )

    def loss(self, model: Transformer, batch: Batch, step: int = 0) -> TransformerLoss:
        codes = batch["codes"] if "codes" in batch else self.dvae.encode(to_float(batch["images"]))
        return model.loss(batch["text"], codes, self.config.text_weight)

    @torch.no_grad()
    def validate(self, model: Transformer, step: int) -> Mapping[str, float]:
        config = self.config
        count = min(256, len(self.held))
        losses = []
        with autocast(self.device, config.precision):
            for batch in batches(self.held, self.prepare, batch_size=min(32, count), seed=0):
                losses.append(self.loss(model, {k: v.to(self.device) for k, v in batch.items()}))
                if len(losses) * 32 >= count:
                    break
        drawn = DallE(self.dvae, model, self.tokenizer)
        rows = [drawn.candidates(p, num_candidates=8, seed=0) for p in config.prompts]
        folder = config.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid([c.image for row in rows for c in row], 8).save(folder / f"step-{step}.png")
        fields = ("text", "image")
        return {f: float(torch.stack([getattr(x, f) for x in losses]).mean()) for f in fields}

    def save(self, model: Transformer, folder: Path) -> None:
        DallE(self.dvae, model, self.tokenizer).save_pretrained(folder)


def main(args: Sequence[str] | None = None) -> None:
    with clear_errors():
        config = parse_preset(TRANSFORMER_PRESETS, args, __doc__.splitlines()[0])
        run = TransformerTraining(config)
        fit(run.model, run.loss, run.stream, config, save_model=run.save, validate=run.validate)
        print(
            f"The model is in {config.out}; draw with: python sample.py PROMPT --model {config.out}"
        )


if __name__ == "__main__":
    main()
