"""Captions to tokens: byte-pair encoding with one padding token per text position (paper §2.2).

The paper lower-cases captions and encodes them with 16,384 BPE tokens, at most 256 per caption,
with 10 % BPE dropout while training. Here the BPE works on bytes, so that any text at all has an
encoding and there is no unknown token. Imported models bring other BPEs, with a `TextFormat`.

Legend: B batch, T text_len.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from dalle1.json_files import parse_json
from dalle1.model_files import refuse_pointer
from dalle1.storage import write_atomic
from dalle1.text.format import CLEANERS, TextFormat
from dalle1.text.known_words import Words

BYTES = 256  # the smallest vocabulary: one token per byte
WORDS_NAME = "words.json"  # beside the vocabulary
FORMAT_START = '{"format":'  # of the vocabulary of an imported model


class Tokenizer:
    """Byte-level BPE over lower-cased, NFKC-normalised captions with single spaces.

    Ids below `vocab_size` are BPE tokens. A position `p` that holds no token gets the id
    `vocab_size + p`: the paper learns a separate padding embedding for every text position.
    So the ids of a `[B, T]` batch run over `[0, vocab_size + T)`. `words` are the words of the
    training captions, None if they were not kept. An imported model's `format` replaces the rules
    for cleaning and padding, and its vocabulary may be another BPE.
    """

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        words: Words | None = None,
        format: TextFormat | None = None,
    ) -> None:
        self.bpe, self.words, self.format = bpe, words, format or TextFormat()
        self.vocab_size: int = self.format.vocab_size or bpe.get_vocab_size()
        self._ids: dict[str, int] = bpe.get_vocab()
        model = parse_json(bpe.to_str())["model"]
        self._suffix: str = model["end_of_word_suffix"] or ""
        self._unknown: int | None = self._ids.get(model["unk_token"] or "")
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn at most `vocab_size` tokens (>= 256, the bytes); few captions give fewer tokens."""
        if vocab_size < BYTES:
            raise ValueError(
                f"vocab_size is {vocab_size}: a byte-level vocabulary needs at least {BYTES}"
            )
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence(
            [
                normalizers.NFKC(),
                normalizers.Lowercase(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        # The prefix space makes a word the same token at the start of a caption and inside it.
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        captions = [_well_formed(caption) for caption in captions]
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, Words.of(captions))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a vocabulary written by `save`. ValueError when it is missing or damaged."""
        path = Path(path)
        remedy = "fetch the file again, or write one with Tokenizer.train(...).save(path)"
        if not path.is_file():
            raise ValueError(f"no vocabulary at {path}: {remedy}")
        refuse_pointer(path)
        try:
            content = path.read_text(encoding="utf-8")
            text_format = None
            if content.startswith(FORMAT_START):
                values = parse_json(content, dict)
                text_format = TextFormat.of(values["format"])
                content = json.dumps(values["tokenizer"])
            bpe = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises bare Exceptions
            reason = (str(error) or repr(error)).splitlines()[0]
            raise ValueError(f"{path} is not a readable vocabulary ({reason}): {remedy}") from error
        if not _is_bpe(bpe, byte_level=text_format is None):
            raise ValueError(f"{path} holds a tokenizer, but not a byte-level BPE: {remedy}")
        kept = path.with_name(WORDS_NAME)
        return cls(bpe, Words.load(kept) if kept.is_file() else None, text_format)

    def save(self, path: Path) -> None:
        """Write the vocabulary in the `tokenizers` library's JSON format, and any words beside.

        The vocabulary of an imported model is one entry of a JSON object, beside its format.
        """
        path = Path(path)
        if self.words is not None:
            self.words.save(path.with_name(WORDS_NAME))
        else:  # those of another vocabulary
            path.with_name(WORDS_NAME).unlink(missing_ok=True)
        content = self.bpe.to_str(pretty=True)
        if self.format != TextFormat():
            content = f'{FORMAT_START} {json.dumps(asdict(self.format))}, "tokenizer": {content}}}'
        write_atomic(path, content)

    def count(self, caption: str) -> int:
        """Count the tokens of a caption, before any cutting."""
        return len(self.format.around(self._encode(caption)))

    def encode(
        self,
        captions: Sequence[str],
        text_len: int,
        *,
        dropout: float = 0.0,
        rng: random.Random | None = None,
        ends: bool = True,
    ) -> Tensor:
        """Encode captions to `[B, text_len]` ids, filled up with the pads of their positions.

        A caption keeps at most `text_len - 1` tokens, because the transformer's start-of-text
        state takes one position; the rest is cut silently (check with `count`). `dropout` is the
        probability in [0, 1] of skipping a merge (Provilkov et al. 2020, arXiv 1910.13267), with
        random numbers from `rng`. Without `ends`, a caption is open at its end, to be continued.
        """
        if isinstance(captions, str):
            raise ValueError("captions is one string: pass a list of strings")
        if text_len < 2:
            raise ValueError(f"text_len is {text_len}: it must be at least 2")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}: it must lie in [0, 1]")
        if dropout > 0.0 and rng is None:
            raise ValueError("dropout > 0 needs an rng: pass random.Random(seed)")
        pads = torch.arange(self.vocab_size, self.vocab_size + text_len)
        tokens = pads.repeat(len(captions), 1)  # [B, T]
        for row, caption in zip(tokens, captions, strict=True):
            if rng is not None and dropout > 0.0:
                ids = self._encode_with_dropout(caption, dropout, rng)
            else:
                ids = self._encode(caption)
            ids = self.format.around(ids)
            if not ends:
                ids = ids[: len(ids) - len(self.format.eos)]
            ids = ids[: self.format.limit(text_len)]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        if self.format.pad_id is not None:
            first = len(self.format.bos)
            kept = tokens[:, first:]
            tokens[:, first:] = torch.where(kept == self.format.pad_id, pads[first:], kept)
        return tokens

    def encode_prompt(self, prompt: str, text_len: int, ends: bool = True) -> Tensor:
        """Encode one caption, [T], with a warning if it is cut; see `encode`."""
        tokens, limit = self.encode([prompt], text_len, ends=ends)[0], self.format.limit(text_len)
        if (count := self.count(prompt)) > limit:
            kept = self.decode(tokens[None])[0]
            warnings.warn(
                f"the prompt has {count} tokens, expected at most {limit}; it is cut to: {kept}",
                stacklevel=3,
            )
        return tokens

    def decode(self, tokens: Tensor) -> list[str]:
        """Decode `[B, T]` ids to captions without padding; broken UTF-8 becomes U+FFFD."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected [B, T]")
        known, is_caption = self.bpe.get_vocab_size(), self.format.is_caption
        rows = [[i for i in row if i < known and is_caption(i)] for row in tokens.tolist()]
        return [self.bpe.decode(row, skip_special_tokens=False).strip() for row in rows]

    def _encode(self, caption: str) -> list[int]:
        return self.bpe.encode(self._clean(caption), add_special_tokens=False).ids

    def _encode_with_dropout(self, caption: str, dropout: float, rng: random.Random) -> list[int]:
        # Hugging Face's own BPE dropout cannot be seeded, so the merges are applied here.
        text = self._clean(caption)
        if self.bpe.normalizer is not None:
            text = self.bpe.normalizer.normalize_str(text)
        found: list[int] = []
        for word, _ in self.bpe.pre_tokenizer.pre_tokenize_str(text):
            pieces = [*word[:-1], word[-1] + self._suffix]
            pieces = _merge(pieces, self._ranks, dropout, rng)
            ids = (self._ids.get(piece, self._unknown) for piece in pieces)
            for token, run in groupby(i for i in ids if i is not None):
                found += [token] if token == self._unknown else run
        return found

    def _clean(self, caption: str) -> str:
        return CLEANERS[self.format.clean](_well_formed(caption))


def _merge(
    pieces: list[str],
    ranks: dict[tuple[str, str], int],
    dropout: float,
    rng: random.Random,
) -> list[str]:
    """Join the pair of best rank until none is left; each chance is skipped with `dropout`."""

    def chances() -> Iterator[tuple[int, int]]:  # (rank, index) of every merge not skipped
        for index, pair in enumerate(pairwise(pieces)):
            if pair in ranks and rng.random() >= dropout:
                yield ranks[pair], index

    while (best := min(chances(), default=None)) is not None:
        i = best[1]
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]
    return pieces


def _well_formed(caption: str) -> str:
    # Lone surrogates (broken JSON escapes in web captions) have no UTF-8 form: they become "?".
    return caption.encode("utf-8", "replace").decode("utf-8")


def _is_bpe(bpe: tokenizers.Tokenizer, byte_level: bool) -> bool:
    if not isinstance(bpe.model, models.BPE) or bpe.pre_tokenizer is None:
        return False
    vocab = bpe.get_vocab()
    if set(vocab.values()) != set(range(len(vocab))):
        return False
    return not byte_level or vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
