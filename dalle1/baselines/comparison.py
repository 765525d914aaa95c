"""Bits per token of n-grams, an LSTM and a transformer on the same held-out pairs, with samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle1.baselines.lstm import LSTM, train_lstm
from dalle1.baselines.ngram import (
    NEIGHBOURS,
    Contexts,
    NGram,
    max_order,
    neighbour_contexts,
    preceding,
    raster_contexts,
    sample_grids,
)
from dalle1.console import bar
from dalle1.data.images import grid, save_png
from dalle1.evaluation.bits import Pairs, bits_scores, is_counted, read_pairs, tokenizer_folder
from dalle1.evaluation.report import Scores
from dalle1.model.transformer import TransformerConfig
from dalle1.pipeline import DallE
from dalle1.sampling.filters import PAPER

COLUMNS = ("parameters", "bits per text token", "bits per code", "bits per code ±")


@dataclass(frozen=True, kw_only=True)
class BaselinesOptions:
    """Compare a transformer with n-grams and an LSTM, fitted to the same tokens."""

    model: str = "bundled"
    """Folder of the model, or "bundled"; its tokenizers set the tokens of all."""
    data: str = "toybox:2000"
    """Dataset, as in training: images, or codes of this model's image tokenizer. The baselines are
    fitted to its training split, and all are measured on its validation split."""
    dvae: Path | None = None
    """Folder of the image tokenizer that encoded the data. None: the model's own; a training saves
    it as another file, so that codes are not recognised."""
    pairs: int = 40_000
    """Maximum number of training pairs."""
    images: int = 256
    """Maximum number of held-out pairs."""
    order: int = 4
    """Longest n-grams, in tokens."""
    lstm_steps: int = 0
    """Updates of the LSTM; 0 skips it."""
    lstm_parameters: int | None = None
    """Parameters of the LSTM. None: those of the transformer."""
    batch_size: int = 16
    """Pairs of each update of the LSTM."""
    learning_rate: float = 2e-3
    """Peak learning rate of the LSTM."""
    prompt: str = "a red star"
    """Caption of the samples in samples.png, which n-grams do not read."""
    samples: int = 8
    """Samples of each model; 0 writes no samples.png."""
    out: Path = Path("runs/baselines")
    """Folder for baselines.json and samples.png."""

    def __post_init__(self) -> None:
        for name in ("pairs", "images", "order", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("lstm_steps", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")


def evaluate_baselines(options: BaselinesOptions) -> Scores:
    """Yield MODEL/SCORE of every model, and write samples.png."""
    model = DallE.from_pretrained(options.model, clip="none", device="cpu")
    folder = tokenizer_folder(options.model, options.dvae)
    config = model.transformer.config
    outside, most = (
        config.codebook_size,
        max_order(max(config.codebook_size, config.text_vocab + 1)),
    )
    if options.order > most:
        raise ValueError(f"order is {options.order}, expected at most {most} for this vocabulary")
    known = read_pairs(model, folder, options.data, options.pairs, split="train")
    held = read_pairs(model, folder, options.data, options.images)
    comparison = Comparison(options=options, model=model, known=known, held=held)
    for order in range(1, options.order + 1):
        yield from comparison.ngram(f"{order}-gram", order, raster_contexts(order - 1, outside))
    for order in range(2, min(len(NEIGHBOURS) + 1, most) + 1):
        name = f"2-D, {order - 1} neighbour{'s' * (order > 2)}"
        yield from comparison.ngram(name, order, neighbour_contexts(order - 1, outside))
    if options.lstm_steps:
        yield from comparison.lstm()
    yield from comparison.transformer()
    if options.samples:
        images = [image for codes in comparison.sampled for image in model.decode(codes)]
        save_png(grid(images, options.samples), options.out / "samples.png")


@dataclass(kw_only=True)
class Comparison:
    """Fits the models to `known` pairs, measures them on `held` ones and samples."""

    options: BaselinesOptions
    model: DallE
    known: Pairs
    held: Pairs
    sampled: list[Tensor] = field(default_factory=list)
    """Codes [samples, W, W] of each model so far."""

    @property
    def config(self) -> TransformerConfig:
        """Sizes of the stream, which all models share."""
        return self.model.transformer.config

    def ngram(self, name: str, order: int, contexts: Contexts) -> Scores:
        """Yield the scores of n-grams of codes, and of the text's n-grams of the same order."""
        known, held = (pairs.codes.numpy() for pairs in (self.known, self.held))
        model = NGram(*_events(known, contexts), self.config.codebook_size)
        bits = -np.log2(model.probabilities(*_events(held, contexts))).reshape(len(held), -1)
        scores = {
            "bits per text token": text_bits(self.config, order, self.known.text, self.held.text),
            "bits per code": float(bits.mean()),
            "bits per code ±": 1.96 * float(bits.mean(1).std()) / math.sqrt(len(bits)),
        }
        yield from _named(name, model.parameters, iter(scores.items()))
        if self.options.samples:
            size = self.options.samples, self.config.grid_size
            self.sampled.append(torch.from_numpy(sample_grids(model, contexts, *size, seed=0)))

    def lstm(self) -> Scores:
        """Train an LSTM of the transformer's size, or of --lstm-parameters; yield its scores."""
        options = self.options
        torch.manual_seed(0)
        count = options.lstm_parameters or _parameter_count(self.model.transformer)
        lstm = LSTM.with_parameters(self.config, count)
        with bar(total=options.lstm_steps, unit="step") as progress:

            def on_step(loss: float) -> None:
                progress.set_postfix_str(f"{loss:.3f} nats per code", refresh=False)
                progress.update()

            how = options.lstm_steps, options.batch_size, options.learning_rate
            train_lstm(lstm, self.known, *how, on_step)
        scores = bits_scores(lstm, self.held, self.model.empty_caption())
        yield from _named("LSTM", _parameter_count(lstm), scores)
        if options.samples:
            text = self.model.encode_prompt(options.prompt).repeat(options.samples, 1)
            self.sampled.append(lstm.sample(text, seed=0))

    def transformer(self) -> Scores:
        """Yield the scores of the transformer."""
        transformer, options = self.model.transformer, self.options
        scores = bits_scores(transformer, self.held, self.model.empty_caption())
        yield from _named("transformer", _parameter_count(transformer), scores)
        if options.samples:
            found = self.model.candidates(
                options.prompt, num_candidates=options.samples, rerank="none", **asdict(PAPER)
            )
            self.sampled.append(torch.stack([candidate.codes for candidate in found]))


def _parameter_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _named(name: str, parameters: int, scores: Scores) -> Scores:
    found = {"parameters": float(parameters), **dict(scores)}
    yield from ((f"{name}/{column}", found[column]) for column in COLUMNS if column in found)


def _events(grids: np.ndarray, contexts: Contexts) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of grids [B, W, W] in a row, [M], and their contexts, [M, K]."""
    return grids.reshape(-1), contexts(grids).reshape(grids.size, -1)


def text_bits(config: TransformerConfig, order: int, known: Tensor, held: Tensor) -> float:
    """Return the bits per counted token of text [B, L] under n-grams fitted to other text."""
    vocabulary = config.text_vocab + 1  # padding is one token, the end

    def split(text: Tensor) -> tuple[np.ndarray, np.ndarray]:
        tokens = text.clamp_max(config.text_vocab).numpy()
        chosen = is_counted(config, text).numpy()
        return tokens[chosen], preceding(tokens, order - 1, vocabulary)[chosen]

    model = NGram(*split(known), vocabulary)
    return float(-np.log2(model.probabilities(*split(held))).mean())


def format_baselines_table(scores: Mapping[str, float]) -> str:
    """Return the scores as a table, a model a row."""
    names = list(dict.fromkeys(name.partition("/")[0] for name in scores))
    width = max(map(len, names))
    lines = [f"{'':{width}}" + "".join(f"{column:>22}" for column in COLUMNS)]
    for name in names:
        numbers = (scores.get(f"{name}/{column}", math.nan) for column in COLUMNS)
        cells = (f"{x:22,.0f}" if x >= 1000 else f"{x:22.3f}" for x in numbers)
        lines.append(f"{name:{width}}" + "".join(cells))
    return "\n".join(lines)
