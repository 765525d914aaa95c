"""Captions to tokens and back: round trips, pads, cutting, dropout, damaged vocabularies."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dalle1.text.bpe import Tokenizer

CAPTIONS = [
    f"a {size} {fill} {noun} on the {surface}"
    for size in ("small", "large")
    for fill in ("red", "avocado", "knitted")
    for noun in ("cube", "armchair", "teapot")
    for surface in ("table", "moon")
]
UNSEEN = [
    *("", "   ", "a red cube", "naïve café, 日本語 🙂!", "x\x00y", "it's 12.5% of snow_man's hat"),
    *(" ".join(CAPTIONS), "zzz" * 40),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(CAPTIONS), 320)


@pytest.mark.parametrize("caption", UNSEEN)
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, caption: str) -> None:
    tokens = tokenizer.encode([caption], tokenizer.count(caption) + 2)
    assert tokenizer.decode(tokens) == [caption.strip()]


def test_captions_are_normalised(tokenizer: Tokenizer) -> None:
    variants = ["A  Red\n\tCUBE ", "ａ red cube", "a\u00a0red cube"]
    expected = tokenizer.encode(["a red cube"], 8)
    assert all(torch.equal(tokenizer.encode([v], 8), expected) for v in variants)
    # A lone surrogate has no bytes, so it cannot be kept; it must not stop a training either.
    assert tokenizer.decode(tokenizer.encode(["a\ud800b"], 16)) == ["a?b"]


def test_a_word_is_the_same_token_anywhere(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode(["cube cube"], 3)[0, :2].tolist()
    assert first == second


def test_every_position_has_its_own_pad(tokenizer: Tokenizer) -> None:
    v, text_len = tokenizer.vocab_size, 6
    tokens = tokenizer.encode(["", "a red cube"], text_len)
    assert tokens.dtype == torch.long
    assert tokens[0].tolist() == [v, v + 1, v + 2, v + 3, v + 4, v + 5]
    assert tokens[1, 3:].tolist() == [v + 3, v + 4, v + 5]
    assert (tokens[1, :3] < v).all()
    assert tokenizer.encode([], text_len).shape == (0, text_len)


def test_long_captions_are_cut_and_the_last_position_is_a_pad(tokenizer: Tokenizer) -> None:
    caption = "a red cube on the moon"
    whole = tokenizer.encode([caption], 32)[0]
    cut = tokenizer.encode([caption], 4)[0]
    assert tokenizer.count(caption) == 6
    assert cut.tolist() == [*whole[:3].tolist(), tokenizer.vocab_size + 3]


def test_dropout_of_zero_is_the_librarys_encoding(tokenizer: Tokenizer) -> None:
    for caption in [*UNSEEN, *CAPTIONS]:
        by_hand = tokenizer._encode_with_dropout(caption, 0.0, random.Random(0))
        assert by_hand == tokenizer.bpe.encode(caption).ids


def test_dropout_of_one_yields_single_bytes(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(["a red café"], 32, dropout=1.0, rng=random.Random(0))
    assert (tokens < tokenizer.vocab_size).sum() == len(" a red café".encode())
    assert tokenizer.decode(tokens) == ["a red café"]


def test_dropout_can_be_repeated_and_keeps_the_text(tokenizer: Tokenizer) -> None:
    def encode(seed: int) -> torch.Tensor:
        return tokenizer.encode(CAPTIONS, 64, dropout=0.3, rng=random.Random(seed))

    assert torch.equal(encode(1), encode(1))
    assert not torch.equal(encode(1), encode(2))
    assert tokenizer.decode(encode(1)) == CAPTIONS


def test_dropout_skips_its_share_of_merges() -> None:
    # One merge in the vocabulary and one chance per word: skipped with the probability itself.
    tokenizer = Tokenizer.train(["bb bb bb"], 257)
    rng = random.Random(0)
    lengths = [len(tokenizer._encode_with_dropout("bb", 0.25, rng)) for _ in range(4000)]
    assert set(lengths) == {2, 3}  # " b" merged or not, then "b"
    assert lengths.count(3) / 4000 == pytest.approx(0.25, abs=0.03)


def test_saved_vocabularies_come_back_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "new" / "vocab.json"
    tokenizer.save(path)
    assert {file.name for file in path.parent.iterdir()} == {"vocab.json", "words.json"}
    for copy in (Tokenizer.load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.vocab_size == tokenizer.vocab_size
        assert torch.equal(copy.encode(UNSEEN, 64), tokenizer.encode(UNSEEN, 64))


def test_training_is_repeatable_and_bounded() -> None:
    first, second = (Tokenizer.train(CAPTIONS, 280) for _ in range(2))
    assert first.bpe.to_str() == second.bpe.to_str()
    assert first.vocab_size == 280
    assert Tokenizer.train([], 280).vocab_size == 256


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "{}",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"BPE"', '"Unigram"'),
        lambda text: '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
    ],
)
def test_a_damaged_vocabulary_is_named(
    tokenizer: Tokenizer, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(damage(tokenizer.bpe.to_str()))
    with pytest.raises(ValueError, match=r"vocab\.json .*fetch the file again"):
        Tokenizer.load(path)


def test_mistakes_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no vocabulary at .*missing"):
        Tokenizer.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="at least 256"):
        Tokenizer.train(CAPTIONS, 255)
    with pytest.raises(ValueError, match="text_len is 1"):
        tokenizer.encode(["a"], 1)
    with pytest.raises(ValueError, match=r"dropout is 1\.5"):
        tokenizer.encode(["a"], 8, dropout=1.5, rng=random.Random(0))
    with pytest.raises(ValueError, match="dropout is nan"):
        tokenizer.encode(["a"], 8, dropout=float("nan"), rng=random.Random(0))
    with pytest.raises(ValueError, match="rng"):
        tokenizer.encode(["a"], 8, dropout=0.1)
    with pytest.raises(ValueError, match="list of strings"):
        tokenizer.encode("a red cube", 8)
    with pytest.raises(ValueError, match=r"expected \[B, T\]"):
        tokenizer.decode(torch.zeros(3, dtype=torch.long))
