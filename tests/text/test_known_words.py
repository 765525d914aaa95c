"""The words that a model knows: the message for a prompt with others, which is sampled anyway."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from dalle1 import DallE
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.text.bpe import Tokenizer
from dalle1.text.known_words import Words, words_of
from dalle1.toybox import NOUNS, Toybox
from dvae import DVAE, DVAEConfig

CAPTIONS = ["A red cube.", "a blue star", "two red cubes, side by side", "a Straße at night"] * 3


@pytest.fixture(scope="module")
def model() -> DallE:
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    dvae = DVAEConfig(image_size=16, codebook_size=8, width=4, blocks_per_group=1, code_width=8)
    size = {"width": 16, "depth": 1, "heads": 2, "grid_size": 2, "codebook_size": 8}
    config = TransformerConfig(text_vocab=tokenizer.vocab_size, text_len=16, **size)
    return DallE(DVAE(dvae).eval(), Transformer(config).eval(), tokenizer)


def warned(model: DallE, *prompts: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = list(model.sample(prompts, num_candidates=1))
    assert [len(candidates) for candidates in results] == [1] * len(prompts), "sampled all the same"
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("An Avocado-shaped armchair, please!", ["an", "avocado", "shaped", "armchair", "please"]),
        ("  ２ cats' tails_ ", ["2", "cats", "tails"]),
        ("I'd like the cat’s hat", ["i", "like", "the", "cat", "hat"]),
        ("赤い 椅子", ["赤", "い", "椅", "子"]),
        ("", []),
    ],
)
def test_words_are_split_as_captions_are_read(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_a_word_is_known_once_it_was_read_a_few_times() -> None:
    words = Words.of([*CAPTIONS, "a rare beast"])
    assert words.unknown_words_message("a RED star, by night") is None
    assert "'beast'" in str(words.unknown_words_message("a red beast"))


@pytest.mark.parametrize("prompt", ["a red cube", "A Red  CUBE!", "by night: two blue cubes"])
def test_known_words_print_no_message(model: DallE, prompt: str) -> None:
    assert warned(model, prompt) == []


def test_each_prompt_with_an_unknown_word_is_reported_once(model: DallE) -> None:
    [first, second] = warned(model, "a red cubs", "a hedgehog", "a red cube", "a hedgehog")
    assert first.startswith("this model does not know 'cubs' (did you mean cubes or cube?)")
    assert second.startswith("this model does not know 'hedgehog'")
    assert "it was trained on captions about: cube, star" in second
    assert warned(model, "naïve 🙂 \x00")[0].startswith("this model does not know 'naïve'")


def test_hints_are_like_the_word_and_few() -> None:
    words = Words.of(Toybox(num_scenes=4000).caption(i) for i in range(4000))
    assert set(words.endings) <= set(NOUNS), "the objects of captions, not their style"
    assert "'elefant' (did you mean elephant or elephants?)" in str(
        words.unknown_words_message("a red elefant")
    )
    for word in ("top", "dozen", "photograph", "can"):
        assert f"does not know '{word}'; it was" in str(words.unknown_words_message(word))
    long = " ".join(f"qqq{letter * 4}" for letter in "abcdefg")
    assert "and 2 more words; it was trained" in str(words.unknown_words_message(long))


@pytest.mark.parametrize(
    "prompt",
    ["the cat's big hat", "I'd like 3 tiny stars", "one photo of a painting", "red colored cars"],
)
def test_common_words_are_known(prompt: str) -> None:
    words = Words.of(Toybox(num_scenes=8000).caption(i) for i in range(8000))
    assert words.unknown_words_message(prompt) is None


def test_the_words_are_saved_with_the_model(model: DallE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = DallE.from_pretrained(tmp_path, device="cpu")
    assert loaded.tokenizer.words == model.tokenizer.words
    (tmp_path / "words.json").unlink()  # as in models from before
    older = DallE.from_pretrained(tmp_path, device="cpu")
    assert older.tokenizer.words is None
    assert warned(older, "a hedgehog") == []
    older.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "words.json").exists()
    same = torch.equal(*(m.tokenizer.encode(["a cube"], 8) for m in (older, loaded)))
    assert same, "the vocabulary is what it was"
    (tmp_path / "words.json").write_text('{"counts": 3}')
    with pytest.raises(ValueError, match=r"words\.json is damaged"):
        DallE.from_pretrained(tmp_path, device="cpu")


def test_fine_tuning_adds_words() -> None:
    words = Words.of(CAPTIONS).merged(Words.of(["a green hedgehog"] * 5))
    assert words.unknown_words_message("a red hedgehog") is None
    assert words.endings[0] == "hedgehog"
    assert words.counts["a"] == 3 * 3 + 5
