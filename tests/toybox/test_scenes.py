"""Toybox: scenes, held-out pairs, rendered images and errors."""

import dataclasses
import itertools
import json
import random
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toybox_scenes import alone, pixels, scenes

import dalle1.toybox
from dalle1.toybox import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    FILL_SURVIVES,
    FILLS,
    NOUNS,
    SIZES,
    SPLITS,
    STYLES,
    Item,
    Scene,
    Toybox,
    is_held_out,
    is_style_held_out,
    render,
    sample_scene,
)

# Words


def test_the_vocabulary_is_large_and_has_no_duplicates() -> None:
    assert len(NOUNS) >= 44
    assert len(COLOURS) == 12
    assert len(FILLS) >= 36
    assert len(STYLES) >= 4
    assert FILLS == COLOURS + CONCEPTS
    for words in (NOUNS, FILLS, STYLES, BACKGROUNDS, SIZES, SPLITS):
        assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("is_out", "words", "famous"),
    [
        (is_held_out, FILLS, ("avocado", "armchair")),
        (is_style_held_out, STYLES, ("neon", "fish")),
    ],
)
def test_a_tenth_of_the_pairs_is_held_out_evenly(
    is_out: Callable[[str, str], bool], words: tuple[str, ...], famous: tuple[str, str]
) -> None:
    assert is_out(*famous)
    table = np.array([[is_out(word, noun) for noun in NOUNS] for word in words])
    assert 0.09 <= table.mean() <= 0.11
    assert table.mean(1).min() >= 0.05
    assert table.mean(1).max() <= 0.15
    assert table.sum(0).max() <= np.ceil(0.15 * len(words))
    if len(words) >= 10:
        assert table.mean(0).min() >= 0.05


def test_new_words_do_not_change_held_out_pairs() -> None:
    """The pairs of the first 32 nouns and 29 fills were fixed before words were added."""
    old = [(f, n) for f in FILLS[:29] for n in NOUNS[:32]]
    is_out = " ".join(f"{f}/{n}" for f, n in old if is_held_out(f, n))
    assert is_out.startswith("red/armchair red/cat red/hat red/cactus orange/car")
    assert zlib.crc32(is_out.encode()) == 2010347397


# Scenes


def test_a_scene_depends_on_seed_split_and_index_only() -> None:
    first, again = Toybox(size=32), Toybox(size=64)
    assert [first.scene(i) for i in (5, 3)] == [again.scene(i) for i in (5, 3)]
    assert first.scene(3) != Toybox(size=32, seed=1).scene(3)
    assert first.scene(3) != Toybox("validation", size=32).scene(3)
    assert first[3][0].tobytes() == Toybox(size=32)[3][0].tobytes()
    assert first[3][1] == again[3][1] == first.caption(3)


def test_captions_follow_the_random_generator() -> None:
    world = Toybox(size=32)
    assert world.caption(7, random.Random(1)) == world.caption(7, random.Random(1))
    assert len({world.caption(7, random.Random(seed)) for seed in range(40)}) > 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_never_shows_a_held_out_pair(split: str) -> None:
    for scene in scenes(split, 3000):
        assert not scene.is_held_out
        for item in scene.items:
            assert not is_held_out(item.fill, item.noun)
            assert scene.style is None or not is_style_held_out(scene.style, item.noun)


def test_every_heldout_scene_has_a_held_out_pair() -> None:
    found = scenes("heldout", 2000)
    assert all(scene.is_held_out for scene in found)
    assert sum(len(scene.items) == 1 for scene in found) > len(found) / 2
    by_fill = [any(is_held_out(*item.pair) for item in scene.items) for scene in found]
    assert 0.6 < np.mean(by_fill) < 0.9, "by fill or by style"


def test_all_covers_every_pair() -> None:
    found = scenes("all", 12000)
    assert len({item.pair for scene in found for item in scene.items}) == len(FILLS) * len(NOUNS)
    styled = {(scene.style, item.noun) for scene in found for item in scene.items}
    assert len(styled) == (len(STYLES) + 1) * len(NOUNS)


def test_kinds_of_scenes_have_their_shares() -> None:
    found = scenes("train", 3000)
    kinds = Counter("two" if s.relation else min(len(s.items), 2) for s in found)
    assert kinds[1] / len(found) == pytest.approx(0.60, abs=0.04)
    assert kinds["two"] / len(found) == pytest.approx(0.25, abs=0.04)
    assert kinds[2] / len(found) == pytest.approx(0.15, abs=0.04)
    counted = sum(len(s.items) > 2 for s in found if s.relation)
    assert counted / kinds["two"] == pytest.approx(1 / 3, abs=0.07)
    styles = Counter(scene.style for scene in found)
    assert sum(styles[style] for style in STYLES) / len(found) == pytest.approx(0.25, abs=0.04)
    assert min(styles[style] for style in STYLES) > 100


def test_shares_of_scenes_can_be_chosen() -> None:
    world = Toybox(shares=(40, 25, 35))
    scenes = [world.scene(i) for i in range(2000)]
    assert scenes[7] == Toybox(size=32, shares=(40, 25, 35)).scene(7)
    two = sum(scene.relation is not None for scene in scenes)
    styled = sum(scene.relation is None and scene.style is not None for scene in scenes)
    assert two / 2000 == pytest.approx(0.4, abs=0.04)
    assert styled / 2000 == pytest.approx(0.25, abs=0.04)


def test_relations_are_true_and_objects_stay_apart_and_inside() -> None:
    for scene in scenes("all", 3000):
        for item in scene.items:
            half = item.extent / 2 - 0.03  # a small part of the box may touch the border
            assert half <= item.x <= 1 - half
            assert half <= item.y <= 1 - half
        for one, other in itertools.combinations(scene.items, 2):
            gap = max(abs(one.x - other.x), abs(one.y - other.y))
            assert gap > 0.9 * (one.extent + other.extent) / 2
        if scene.relation is not None:
            for one, other in itertools.product(*scene.groups):
                assert one.noun != other.noun
                assert {
                    "left of": one.x < other.x,
                    "right of": one.x > other.x,
                    "above": one.y < other.y,
                    "below": one.y > other.y,
                }[scene.relation]


def test_sizes_are_visible() -> None:
    for scene in scenes("train", 2000):
        if scene.relation is not None:
            ordered = sorted(scene.items, key=lambda item: item.extent)
            ranks = [SIZES.index(item.size) for item in ordered]
            assert ranks == sorted(ranks)
        elif len(scene.items) == 1:
            item = scene.items[0]
            assert (item.size == "small") == (item.extent < 0.5)
            assert (item.size == "large") == (item.extent > 0.73)


def test_scenes_survive_json() -> None:
    for scene in scenes("all", 200):
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


# Images


@pytest.mark.parametrize("size", [16, 33, 128])
def test_images_have_the_requested_size(size: int) -> None:
    image = render(Toybox().scene(0), size)
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    assert image.size == (size, size)


@pytest.mark.parametrize("fill", ["red", "white", "avocado", "zebra"])
def test_every_noun_looks_different(fill: str) -> None:
    empty = pixels(alone("red", "ball", extent=0.01))
    rendered = [pixels(alone(fill, noun)) for noun in NOUNS]
    for i, image in enumerate(rendered):
        assert (np.abs(image - empty).max(-1) > 20).mean() > 0.08, NOUNS[i]
        for j in range(i):
            assert np.abs(image - rendered[j]).mean() > 3, (NOUNS[i], NOUNS[j])


@pytest.mark.parametrize("noun", ["armchair", "mug", "key"])
def test_every_fill_looks_different(noun: str) -> None:
    rendered = [pixels(alone(fill, noun)) for fill in FILLS]
    for i, image in enumerate(rendered):
        for j in range(i):
            assert np.abs(image - rendered[j]).mean() > 1, (FILLS[i], FILLS[j])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [16, 50, 128])
def test_a_style_changes_the_image(style: str, size: int) -> None:
    scene = Toybox().scene(0)
    plain = render(dataclasses.replace(scene, style=None), size)
    rendered = render(dataclasses.replace(scene, style=style), size)
    assert (rendered.size, rendered.mode) == (plain.size, "RGB")
    assert rendered.tobytes() == render(dataclasses.replace(scene, style=style), size).tobytes()
    for other in {None, *STYLES} - {style}:
        image = render(dataclasses.replace(scene, style=other), size)
        assert np.abs(np.asarray(image, np.int16) - np.asarray(rendered, np.int16)).mean() > 8


@pytest.mark.parametrize("style", STYLES)
def test_every_noun_looks_different_in_a_style(style: str) -> None:
    rendered = [pixels(alone("red", noun, style=style), 64) for noun in NOUNS]
    for i, image in enumerate(rendered):
        for j in range(i):
            assert np.abs(image - rendered[j]).mean() > 3, (NOUNS[i], NOUNS[j])


@pytest.mark.parametrize("style", STYLES)
def test_fills_that_survive_a_style_look_different_in_it(style: str) -> None:
    fills = sorted(FILL_SURVIVES[style])
    rendered = [pixels(alone(fill, "armchair", style=style), 64) for fill in fills]
    for i, image in enumerate(rendered):
        for j in range(i):
            assert np.abs(image - rendered[j]).mean() > 1, (fills[i], fills[j])


def test_the_avocado_armchair_has_skin_flesh_and_a_stone() -> None:
    image = pixels(alone("avocado", "armchair", extent=0.8), 128)
    stone, flesh, skin = image[47, 66], image[92, 29], image[54, 36]
    assert stone[0] > stone[1] > stone[2], "brown"
    assert flesh.min() > 90, "pale"
    assert flesh[1] > flesh[2] + 40, "yellow-green"
    assert skin.max() < 110, "dark"


def test_a_seed_moves_the_texture_and_keeps_the_shape() -> None:
    one, other = (pixels(alone("zebra", "mug", seed=seed)) for seed in (1, 2))
    assert np.abs(one - other).mean() > 2
    assert (one[0] == other[0]).all()


# Errors


def test_errors_name_the_value_and_the_choices() -> None:
    with pytest.raises(ValueError, match="got noun 'spoon', expected one of armchair"):
        Item(noun="spoon", fill="red")
    with pytest.raises(ValueError, match="got fill 'plaid', expected one of red"):
        is_held_out("plaid", "mug")
    with pytest.raises(ValueError, match="got split 'test', expected one of train"):
        Toybox("test")
    with pytest.raises(ValueError, match="got split 'test'"):
        sample_scene(random.Random(0), "test")
    with pytest.raises(ValueError, match="got size 15, expected whole pixels from 16"):
        Toybox(size=15)
    with pytest.raises(ValueError, match="got size 8"):
        render(alone("red", "mug"), 8)
    with pytest.raises(ValueError, match="got extent 2"):
        alone("red", "mug", extent=2)
    with pytest.raises(ValueError, match="got background 'night'"):
        alone("red", "mug", background="night")
    with pytest.raises(ValueError, match="got style 'oil', expected one of sketch"):
        alone("red", "mug", style="oil")
    with pytest.raises(ValueError, match="got 5 items alike, expected at most 4"):
        Scene(items=(Item(noun="mug", fill="red"),) * 5)
    with pytest.raises(ValueError, match="got no items"):
        Scene(items=())
    with pytest.raises(ValueError, match="expected 2"):
        Scene(items=(Item(noun="mug", fill="red"),), relation="above")
    with pytest.raises(IndexError, match="got index 3, expected 0 to 2"):
        Toybox(num_scenes=3).scene(3)


def test_length() -> None:
    assert len(Toybox()) == 2**31 - 1
    assert len(Toybox(num_scenes=12)) == 12


def test_importing_is_cheap() -> None:
    """Toybox imports nothing heavy. A stub replaces its parent package, which may import torch."""
    folder = str(Path(dalle1.toybox.__file__).parents[1])
    code = f"""
import sys, types
sys.modules["dalle1"] = types.ModuleType("dalle1")
sys.modules["dalle1"].__path__ = [{folder!r}]
import dalle1.toybox
print({{"torch", "webdataset", "transformers", "tqdm"}} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
