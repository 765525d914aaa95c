"""Hard negatives: words of a caption exchanged or replaced."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dalle1.clip.hard_negatives import HardNegatives
from dalle1.toybox import is_held_out, sample_scene
from dalle1.toybox.captions import plain_caption
from dalle1.toybox.exchangeable import WORD_CLASSES, adds_held_out_pair

COLOURS = ("red", "orange", "blue")
THINGS = ("cube", "ball")
SIDES = ("left of", "right of")


def wrong(caption: str, *classes: tuple[str, ...], tries: int = 40) -> set[str | None]:
    negatives = HardNegatives(classes)
    return {negatives(caption, random.Random(i)) for i in range(tries)}


def test_two_words_of_a_class_are_exchanged() -> None:
    assert wrong("a red cube left of an orange ball", COLOURS) == {
        "an orange cube left of a red ball"
    }
    assert wrong("a red cube left of an orange ball", THINGS) == {
        "a red ball left of an orange cube"
    }


def test_a_single_word_is_replaced() -> None:
    assert wrong("A Red cube", COLOURS) == {"An orange cube", "A blue cube"}
    assert wrong("a cube to the left of it", SIDES) == {"a cube to the right of it"}


def test_each_class_has_its_turn() -> None:
    assert wrong("a red cube left of a blue ball", COLOURS, THINGS, SIDES) == {
        "a blue cube left of a red ball",
        "a red ball left of a blue cube",
        "a red cube right of a blue ball",
    }


def test_only_whole_words_count() -> None:
    assert wrong("a bored cubemaker", COLOURS, THINGS) == {None}
    assert wrong("a red cube on a red ball", COLOURS) == {None}  # an exchange would change nothing


def test_the_longest_of_overlapping_words_counts() -> None:
    assert wrong("a candy cane cube", ("candy", "wood"), ("candy cane", "ice")) == {"an ice cube"}


def test_words_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("red, Blue\n\nleft of,right of\n")
    assert HardNegatives.read(path).classes == [("red", "blue"), ("left of", "right of")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("red, blue\ngreen\n", "line 2 of .* is 'green', expected two words"),
        ("red, red\n", "line 1 of .* expected two words"),
        ("\n", "has no words"),
        (None, "no file .*; expected a text file"),
    ],
)
def test_a_bad_file_is_reported(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        HardNegatives.read(path)


def test_toybox_combines_no_held_out_pair() -> None:
    assert is_held_out("avocado", "armchair")
    assert adds_held_out_pair("a red armchair", "an avocado armchair")
    assert adds_held_out_pair("a red armchair", "two armchairs made of avocado")
    swapped = "an avocado armchair left of a red cube"
    assert adds_held_out_pair("a red armchair left of an avocado cube", swapped)
    assert not adds_held_out_pair(swapped, "a red cube right of an avocado armchair")
    rng, negatives = random.Random(0), HardNegatives(WORD_CLASSES, adds_held_out_pair)
    changed = 0
    for _ in range(200):
        scene = sample_scene(rng, "train")
        caption = plain_caption(scene)
        negative = negatives(caption, rng)
        assert negative != caption
        if negative is not None:
            changed += 1
            assert not adds_held_out_pair(caption, negative)
    assert changed > 190
