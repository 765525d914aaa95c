"""Toybox: the scenes keep their promises, the captions tell the truth, the pictures differ."""

import io
import json
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dalle1.data.toybox
from dalle1.data.toybox import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    FILLS,
    NOUNS,
    SIZES,
    SPLITS,
    Item,
    Scene,
    Toybox,
    describe,
    is_held_out,
    render,
    sample_scene,
)
from dalle1.data.toybox.__main__ import main
from dalle1.data.toybox.captions import article, plural


def scenes(split: str, count: int) -> list[Scene]:
    world = Toybox(split, num_scenes=count)
    return [world.scene(index) for index in range(count)]


def alone(fill: str, noun: str, background: str = "cream", **values: float | int | str) -> Scene:
    item = Item(noun=noun, fill=fill, **values)  # type: ignore[arg-type]
    return Scene(items=(item,), background=background)


def pixels(scene: Scene, size: int = 48) -> np.ndarray:
    return np.asarray(render(scene, size), np.int16)


# The words


def test_the_vocabulary_is_large_and_without_doubles() -> None:
    assert len(NOUNS) >= 28
    assert len(COLOURS) == 12
    assert len(CONCEPTS) >= 12
    assert FILLS == COLOURS + CONCEPTS
    for words in (NOUNS, FILLS, BACKGROUNDS, SIZES, SPLITS):
        assert len(set(words)) == len(words)


def test_a_tenth_of_the_pairs_is_held_out_evenly() -> None:
    assert is_held_out("avocado", "armchair")
    table = np.array([[is_held_out(fill, noun) for noun in NOUNS] for fill in FILLS])
    assert 0.08 <= table.mean() <= 0.12
    assert table.mean(1).min() >= 0.05
    assert table.mean(1).max() <= 0.20
    assert table.mean(0).min() >= 0.05
    assert table.mean(0).max() <= 0.20


# The scenes


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    first, again = Toybox(size=32), Toybox(size=64)
    assert [first.scene(i) for i in (5, 3)] == [again.scene(i) for i in (5, 3)]
    assert first.scene(3) != Toybox(size=32, seed=1).scene(3)
    assert first.scene(3) != Toybox("validation", size=32).scene(3)
    assert first[3][0].tobytes() == Toybox(size=32)[3][0].tobytes()
    assert first[3][1] == again[3][1] == first.caption(3)


def test_captions_follow_the_generator_given() -> None:
    world = Toybox(size=32)
    assert world.caption(7, random.Random(1)) == world.caption(7, random.Random(1))
    assert len({world.caption(7, random.Random(seed)) for seed in range(40)}) > 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_never_shows_a_held_out_pair(split: str) -> None:
    for scene in scenes(split, 3000):
        assert not any(is_held_out(item.fill, item.noun) for item in scene.items)


def test_training_captions_never_name_a_held_out_pair() -> None:
    held_out = {f"{fill} {noun}" for fill in FILLS for noun in NOUNS if is_held_out(fill, noun)}
    for index, scene in enumerate(scenes("train", 2000)):
        caption = describe(scene, random.Random(index))
        assert not any(re.search(rf"\b{pair}\b", caption) for pair in held_out)


def test_every_heldout_scene_has_a_held_out_item() -> None:
    found = scenes("heldout", 2000)
    assert all(any(is_held_out(item.fill, item.noun) for item in s.items) for s in found)
    assert sum(len(scene.items) == 1 for scene in found) > len(found) / 2


def test_all_covers_every_pair() -> None:
    shown = {item.pair for scene in scenes("all", 9000) for item in scene.items}
    assert len(shown) == len(FILLS) * len(NOUNS)


def test_kinds_of_scenes_have_their_shares() -> None:
    found = scenes("train", 3000)
    kinds = Counter("two" if s.relation else min(len(s.items), 2) for s in found)
    assert kinds[1] / len(found) == pytest.approx(0.65, abs=0.04)
    assert kinds["two"] / len(found) == pytest.approx(0.20, abs=0.04)
    assert kinds[2] / len(found) == pytest.approx(0.15, abs=0.04)


def test_relations_are_true_and_things_stay_apart_and_inside() -> None:
    for scene in scenes("all", 3000):
        for item in scene.items:
            half = item.extent / 2 - 0.03  # a small part of the box may touch the border
            assert half <= item.x <= 1 - half
            assert half <= item.y <= 1 - half
        for one, other in zip(scene.items, scene.items[1:]):
            gap = max(abs(one.x - other.x), abs(one.y - other.y))
            assert gap > 0.93 * (one.extent + other.extent) / 2
        if scene.relation is not None:
            one, other = scene.items
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


# The captions


def test_articles_and_plurals() -> None:
    assert [article(w) for w in ("avocado mug", "red star", "umbrella", "orange hat")] == [
        "an avocado mug", "a red star", "an umbrella", "an orange hat",
    ]  # fmt: skip
    assert [plural(n) for n in ("star", "fish", "butterfly", "cactus", "key", "heart")] == [
        "stars", "fish", "butterflies", "cactuses", "keys", "hearts",
    ]  # fmt: skip
    for fill in FILLS:
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]", f"{article(fill)} x")


def test_captions_name_every_fill_and_noun_and_only_those() -> None:
    for index, scene in enumerate(scenes("all", 3000)):
        caption = describe(scene, random.Random(index))
        assert re.fullmatch(r"[a-z, -]+", caption), caption
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]|  ", caption), caption
        for item in scene.items:
            noun = item.noun if len({i.pair for i in scene.items}) == len(scene.items) else None
            assert item.fill in caption, caption
            assert re.search(rf"\b{noun or plural(item.noun)}\b", caption), caption
        nouns = {n for n in NOUNS if re.search(rf"\b({n}|{plural(n)})\b", caption)}
        assert nouns == {item.noun for item in scene.items}, caption


def test_captions_state_counts_sizes_and_backgrounds_truly() -> None:
    for index, scene in enumerate(scenes("train", 3000)):
        caption = describe(scene, random.Random(index))
        if scene.relation is None and len(scene.items) > 1:
            assert {2: "two ", 3: "three "}[len(scene.items)] in caption
        for size in ("small", "large"):
            if f"{size} " in caption:
                item = next(item for item in scene.items if item.size == size)
                assert re.search(rf"\b{size} .*{item.noun}", caption), caption
        if "background" in caption:
            assert caption.endswith(f"on {article(scene.background)} background")


def test_relation_captions_hold_from_either_side() -> None:
    scene = next(s for s in scenes("train", 100) if s.relation == "left of")
    first, second = (item.noun for item in scene.items)
    for seed in range(50):
        caption = describe(scene, random.Random(seed))
        in_order = caption.index(first) < caption.index(second)
        assert ("left of" if in_order else "right of") in caption


def test_the_plainest_caption_is_the_most_frequent() -> None:
    scene = alone("avocado", "armchair")
    said = Counter(describe(scene, random.Random(seed)) for seed in range(1000))
    (plainest, count), (_, next_count) = said.most_common(2)
    assert plainest == "an avocado armchair"
    assert count > 400 > next_count
    assert "an armchair in the shape of an avocado" in said
    assert len(said) > 20


# The pictures


@pytest.mark.parametrize("size", [16, 33, 128])
def test_pictures_have_the_size_asked_for(size: int) -> None:
    picture = render(Toybox().scene(0), size)
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"
    assert picture.size == (size, size)


@pytest.mark.parametrize("fill", ["red", "white", "avocado", "zebra"])
def test_every_noun_looks_different(fill: str) -> None:
    empty = pixels(alone("red", "ball", extent=0.01))
    drawn = [pixels(alone(fill, noun)) for noun in NOUNS]
    for i, picture in enumerate(drawn):
        assert (np.abs(picture - empty).max(-1) > 20).mean() > 0.08, NOUNS[i]
        for j in range(i):
            assert np.abs(picture - drawn[j]).mean() > 3, (NOUNS[i], NOUNS[j])


@pytest.mark.parametrize("noun", ["armchair", "mug", "key"])
def test_every_fill_looks_different(noun: str) -> None:
    drawn = [pixels(alone(fill, noun)) for fill in FILLS]
    for i, picture in enumerate(drawn):
        for j in range(i):
            assert np.abs(picture - drawn[j]).mean() > 1, (FILLS[i], FILLS[j])


def test_the_avocado_armchair_has_skin_flesh_and_a_stone() -> None:
    picture = pixels(alone("avocado", "armchair", extent=0.8), 128)
    stone, flesh, skin = picture[47, 66], picture[92, 29], picture[54, 36]
    assert stone[0] > stone[1] > stone[2], "brown"
    assert flesh.min() > 90, "pale"
    assert flesh[1] > flesh[2] + 40, "yellow-green"
    assert skin.max() < 110, "dark"


def test_a_seed_moves_the_texture_and_keeps_the_shape() -> None:
    one, other = (pixels(alone("zebra", "mug", seed=seed)) for seed in (1, 2))
    assert np.abs(one - other).mean() > 2
    assert (one[0] == other[0]).all()


# The shards


def test_shards_have_the_usual_layout_and_the_same_bytes_twice(tmp_path: Path) -> None:
    arguments = ["--num-scenes", "5", "--size", "32", "--shard-size", "3", "--seed", "4"]
    for folder in ("one", "two"):
        assert main(["--out", str(tmp_path / folder), *arguments]) == 0
    shards = sorted((tmp_path / "one").iterdir())
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar"]
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()
    world = Toybox(size=32, seed=4)
    with tarfile.open(shards[1]) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    keys = ["000010000", "000010001"]
    assert sorted(files) == [f"{key}.{kind}" for key in keys for kind in ("json", "png", "txt")]
    facts = json.loads(files["000010000.json"])
    assert files["000010000.txt"].decode() == facts["caption"] == world.caption(3)
    assert Scene.from_dict(facts["scene"]) == world.scene(3)
    picture = Image.open(io.BytesIO(files["000010000.png"]))
    assert picture.tobytes() == world[3][0].tobytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "3"], "got size 3"),
        (["--num-scenes", "0"], "got num_scenes 0"),
        (["--num-scenes", "1", "--shard-size", "0"], "got shard_size 0"),
        (["--num-scenes", "1", "--out", "{file}/below"], "Not a directory"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    given = [argument.format(file=file) for argument in arguments]
    assert main(["--out", str(tmp_path / "out"), *given]) == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert "\n" not in message


# The mistakes


def test_mistakes_are_explained() -> None:
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
    """Toybox itself stays light; its parent package, which may import torch, is stood in for."""
    folder = str(Path(dalle1.data.toybox.__file__).parent.parent)
    code = f"""
import sys, types
for name, path in (("dalle1", []), ("dalle1.data", [{folder!r}])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
import dalle1.data.toybox
print({{"torch", "webdataset", "transformers", "tqdm"}} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
