"""Toybox's captions are true, varied, and include the phrasings that people use."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from toybox_scenes import alone, below, scenes

from dalle1.text.bpe import Tokenizer
from dalle1.toybox import FILLS, NOUNS, Scene, Toybox, describe, is_held_out
from dalle1.toybox.captions import article, plural
from dalle1.toybox.phrases import NUMBERS, SIZE_WORDS, SYNONYMS


def test_articles_and_plurals() -> None:
    assert [article(w) for w in ("avocado mug", "red star", "umbrella", "orange hat")] == [
        "an avocado mug", "a red star", "an umbrella", "an orange hat",
    ]  # fmt: skip
    assert [plural(n) for n in ("star", "fish", "butterfly", "cactus", "key", "heart")] == [
        "stars", "fish", "butterflies", "cactuses", "keys", "hearts",
    ]  # fmt: skip
    for fill in FILLS:
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]", f"{article(fill)} x")


def named(caption: str, word: str) -> bool:
    """Whether a caption names a noun or a fill, by any synonym, singular or plural."""
    forms = [form for name in (word, *SYNONYMS.get(word, ())) for form in (name, plural(name))]
    return re.search(rf"\b({'|'.join(forms)})\b", caption) is not None


def test_captions_name_every_fill_and_noun_and_only_those() -> None:
    for index, scene in enumerate(scenes("all", 4000)):
        caption = describe(scene, random.Random(index))
        assert re.fullmatch(r"[a-z234, -]+", caption), caption
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]|  |{|}", caption), caption
        for item in scene.items:
            assert named(caption, item.noun), caption
            # The caption of a styled image may omit the fills.
            present = [named(caption.replace("golden", "gold"), i.fill) for i in scene.items]
            wooden = "wooden" in caption and item.fill == "wood"
            assert all(present) or wooden or (scene.style and not any(present)), caption
        nouns = {n for n in NOUNS if named(caption, n)}
        assert nouns == {item.noun for item in scene.items}, caption


def test_counts_sizes_and_backgrounds_in_captions_are_true() -> None:
    counted = 0
    for index, scene in enumerate(scenes("train", 4000)):
        caption = describe(scene, random.Random(index))
        words = caption.translate({ord(str(count)): word for count, word in NUMBERS.items()})
        numbers = sorted(re.findall(rf"\b({'|'.join(NUMBERS.values())})\b", words))
        counts = sorted(NUMBERS[len(group)] for group in scene.groups if len(group) > 1)
        assert numbers in (counts, []), caption
        counted += bool(numbers)
        for size, adjectives in SIZE_WORDS.items():
            if re.search(rf"\b({'|'.join(adjectives)}) ", caption):
                assert any(item.size == size for item in scene.items), caption
        if re.search(r"\bone ", caption):
            assert any(len(group) == 1 for group in scene.groups), caption
        if "background" in caption:
            assert caption.endswith(f"on {article(scene.background)} background")
            assert scene.style is None
    assert counted > 600


STYLE_WORDS = {"sketch": "sketch|pencil|hand-drawn", "pixel art": "pixel", "neon": "neon",
               "stained glass": "stained.glass"}  # fmt: skip


def test_captions_name_the_style_and_no_other() -> None:
    for index, scene in enumerate(scenes("all", 3000)):
        caption = describe(scene, random.Random(index))
        present = [style for style, words in STYLE_WORDS.items() if re.search(words, caption)]
        assert present == ([scene.style] if scene.style else []), caption


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("an armchair in the shape of an avocado", alone("avocado", "armchair")),
        ("an avocado-shaped armchair", alone("avocado", "armchair")),
        ("an armchair, avocado style", alone("avocado", "armchair")),
        ("armchair, avocado style", alone("avocado", "armchair")),
        ("avocado armchair", alone("avocado", "armchair")),
        ("a teapot made of watermelon", alone("watermelon", "teapot")),
        ("a snail that looks like a zebra", alone("zebra", "snail")),
        ("a pixel art cat", alone("red", "cat", style="pixel art")),
        ("a sketch of a strawberry lamp", alone("strawberry", "lamp", style="sketch")),
        ("a neon sign of a blue fish", alone("blue", "fish", style="neon")),
        ("a stained-glass window of a rocket", alone("gold", "rocket", style="stained glass")),
        ("three purple stars below a gold clock", below("purple", "star", 3, "gold", "clock")),
        ("3 purple stars below one gold clock", below("purple", "star", 3, "gold", "clock")),
        (
            "a big red-colored cube",
            Scene(items=(replace(alone("red", "cube").items[0], size="large"),)),
        ),
        ("a photo of a red cube", alone("red", "cube")),
        ("armchairs made of avocados", Scene(items=alone("avocado", "armchair").items * 2)),
    ],
)
def test_common_prompts_are_among_the_captions(prompt: str, scene: Scene) -> None:
    rng = random.Random(0)
    assert any(describe(scene, rng) == prompt for _ in range(20_000))


def test_relation_captions_hold_from_either_side() -> None:
    scene = next(s for s in scenes("train", 100) if s.relation == "left of" and not s.style)
    first, second = (group[0].fill for group in scene.groups)
    for seed in range(80):
        caption = describe(scene, random.Random(seed))
        if re.search(r"\b(and|next to|beside)\b", caption):
            continue
        in_order = caption.index(first) < caption.index(second)
        assert ("left of" if in_order else "right of") in caption


def test_the_plainest_caption_is_the_most_frequent() -> None:
    scene = alone("avocado", "armchair")
    captions = Counter(describe(scene, random.Random(seed)) for seed in range(1000))
    (plainest, count), (_, next_count) = captions.most_common(2)
    assert plainest == "an avocado armchair"
    assert count > 400 > next_count
    assert "an armchair in the shape of an avocado" in captions
    assert len(captions) > 20


def test_training_captions_never_name_a_held_out_pair() -> None:
    held_out = {f"{fill} {noun}" for fill in FILLS for noun in NOUNS if is_held_out(fill, noun)}
    for index, scene in enumerate(scenes("train", 2000)):
        caption = describe(scene, random.Random(index))
        assert not any(re.search(rf"\b{pair}\b", caption) for pair in held_out)


def test_every_caption_fits_the_text_length() -> None:
    captions = [Toybox().caption(index) for index in range(12_000)]
    tokenizer = Tokenizer.train(captions, 1024)
    assert max(map(tokenizer.count, captions)) <= 48, "of 63"
