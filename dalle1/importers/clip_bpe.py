"""Convert the vocabulary of OpenAI's CLIP, as DALLE-pytorch uses it, to `tokenizers`."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dalle1.importers.checkpoint import read_text

MERGES = 49152 - 256 - 2
"""Merges of the file that are read; more follow in it."""
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""Bytes that stand for themselves, first in the vocabulary; the other bytes follow."""
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
# \u017f is the long s, which is an s to a pattern that ignores case.
WORDS = r"'s|'ſ|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def read_clip_bpe(path: str | Path) -> tokenizers.Tokenizer:
    """Read bpe_simple_vocab_16e6.txt, or its .gz.

    Raises: ValueError where the file is another.
    """
    try:
        text = read_text(path)
        pairs = [tuple(line.split()) for line in text.split("\n")[1 : MERGES + 1] if line]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError("no list of merges")
        letters = [chr(b) for b in BYTES] + [chr(256 + n) for n in range(256 - len(BYTES))]
        tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
        tokens += ["".join(pair) for pair in pairs] + list(SPECIAL)
        vocab = {token: i for i, token in enumerate(tokens)}
        bpe = tokenizers.Tokenizer(
            models.BPE(vocab, pairs, end_of_word_suffix="</w>")  # type: ignore[arg-type]
        )
    except OSError:
        raise
    except Exception as error:  # damage can fail in any way
        raise ValueError(
            f"{path} holds no merges of CLIP ({str(error)[:80]}); expected "
            "bpe_simple_vocab_16e6.txt or its .gz"
        ) from error
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return bpe
