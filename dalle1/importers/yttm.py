"""Convert vocabularies of youtokentome, as ru-dalle and RuDOLPH have them, to `tokenizers`.

A file of youtokentome is text: the numbers of characters and merges; a line `codepoint id` for each
character; a line `left right new` for each merge, the first the most important; and the ids of the
four special tokens. Source: VKCOM/YouTokenToMe youtokentome/cpp/utils.cpp and bpe.cpp.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dalle1.importers.checkpoint import read_text

SPECIAL = ("<UNK>", "<PAD>", "<BOS>", "<EOS>")
"""Special tokens in the order of their ids in the last line."""
MAX_LENGTH = 1000
"""Most characters of a token: merges of merges double it with every line of a hostile file."""
SPACE = r"[\t-\r \u2581]+"
"""Characters that separate words: the spaces of ASCII, and the sign for a space itself."""


def read_yttm(path: str | Path) -> tokenizers.Tokenizer:
    """Read a vocabulary of youtokentome; captions get exactly the ids that it gives them.

    A run of unknown characters is one unknown token.

    Raises: ValueError where the file is another, or two tokens have the same text.
    """
    try:
        lines = read_text(path).splitlines()
        counts, *rows = [[int(number) for number in line.split()] for line in lines]
        characters, merges, (special,) = (
            rows[: counts[0]],
            rows[counts[0] : sum(counts)],
            rows[sum(counts) :],
        )
        texts = {token: chr(code) for code, token in characters}
        texts |= {token: name for name, token in zip(SPECIAL, special) if token >= 0}
        pairs = []
        for left, right, new in merges:
            pairs.append((texts[left], texts[right]))
            texts[new] = texts[left] + texts[right]
            if len(texts[new]) > MAX_LENGTH:
                raise ValueError(f"token {new} is longer than {MAX_LENGTH} characters")
    except (ValueError, KeyError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no vocabulary of youtokentome ({repr(error)[:80]}); expected bpe.model"
        ) from error
    vocab = {text: token for token, text in texts.items()}
    if len(vocab) != len(texts) or set(texts) != set(range(len(texts))):
        raise ValueError(
            f"{path} has {len(texts)} tokens with {len(vocab)} different texts, expected as many "
            "of each, and ids without gaps"
        )
    bpe = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token=SPECIAL[0], fuse_unk=True))
    bpe.normalizer = normalizers.Sequence(
        [  # \A and \z, since ^ and $ also match at line breaks
            normalizers.Replace(tokenizers.Regex(rf"\A{SPACE}|{SPACE}\z"), ""),
            normalizers.Replace(tokenizers.Regex(SPACE), " "),
        ]
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always")
    bpe.decoder = decoders.Metaspace("\u2581", prepend_scheme="always")
    return bpe
