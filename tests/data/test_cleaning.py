"""Captions of every form, which samples are skipped, and JPEGs decoded small."""

from __future__ import annotations

import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.data import ReadOptions, open_source
from dalle1.data.cleaning import (
    CleaningConfig,
    captions_among,
    captions_in,
    clean,
    read_image,
    sample_caption,
)
from dalle1.data.codes import open_codes
from dalle1.data.skipped import DAMAGE, RULES, BadSample, SkippedSample, SkipStats
from dalle1.data.sources.folder import Folder
from dalle1.data.sources.indexed_shards import IndexedShards
from dalle1.data.sources.mixture import Mixture, weighted_round_robin
from dalle1.data.sources.streaming_shards import StreamingShards
from dalle1.data.spec import split_names
from dvae import DVAE, DVAEConfig

RNG = random.Random(0)
NO_CLEANING = CleaningConfig()


def write_image(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def captions_of(source: Any, index: int = 0) -> set[str]:
    return {source.caption(index, random.Random(i)) for i in range(60)}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", " one \n\n two\n", {"one", "two"}),
        ("a.txt", "\ufeffone", {"one"}),
        ("a.json", '["one", "two", ""]', {"one", "two"}),
        ("a.json", '"one"', {"one"}),
        ("a.json", '{"caption": "one", "url": "http://a"}', {"one"}),
        ("a.json", '{"captions": ["one", "two"], "caption": "one"}', {"one", "two"}),
        ("captions.csv", 'file,caption\na.png,"one, two"\na.png,three\n', {"one, two", "three"}),
        ("captions.csv", "file_name,text\na.png,one\n", {"one"}),
        ("captions.jsonl", '{"file": "a.png", "caption": ["one", "two"]}\n\n', {"one", "two"}),
        ("captions.jsonl", '{"file_name": "a.png", "text": "one"}', {"one"}),
    ],
)
def test_captions_of_every_form(
    tmp_path: Path, name: str, content: str, expected: set[str]
) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / name).write_text(content, encoding="utf-8")
    source = open_source(str(tmp_path))
    assert len(source) == 1
    assert captions_of(source) == expected


def test_a_list_of_captions_is_read_though_some_rows_are_bad(tmp_path: Path) -> None:
    for name in ("a.png", "deep/b.png", "c.png"):
        write_image(tmp_path / name)
    rows = [b"file,caption", b"a.png,one", b"deep/b.png,zwei \xff", b"gone.png,three", b",four"]
    (tmp_path / "captions.csv").write_bytes(b"\n".join(rows))
    source = Folder(tmp_path)
    assert [source.name(i) for i in range(len(source))] == [str(tmp_path / "a.png")]
    causes = [(pair.cause, pair.where.rpartition("/")[2]) for pair in source.skipped]
    assert causes == [
        ("caption not UTF-8", "captions.csv:3"),
        ("no image", "captions.csv:5"),
        ("no image", "gone.png"),
        ("image not in the list", "c.png"),
    ]
    assert len(Folder(tmp_path, options=ReadOptions(captions=False))) == 3
    (tmp_path / "captions.csv").rename(tmp_path / "captions.jsonl")
    lines = ['{"file": "a.png", "caption": 3}', "{", "[]", '{"file": "c.png", "caption": "c"}']
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    source = Folder(tmp_path)
    assert [source.name(i) for i in range(len(source))] == [str(tmp_path / "c.png")]
    assert [pair.cause for pair in source.skipped[:3]] == ["damaged captions"] * 3
    (tmp_path / "captions.csv").write_text("name;words\n")
    with pytest.raises(
        ValueError, match=r"captions.csv has the columns 'name', 'words'; expected file"
    ):
        Folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "suffix", "cause"),
    [
        (b"zwei \xff", ".txt", "caption not UTF-8"),
        (b"\xff\xfe{", ".json", "caption not UTF-8"),
        (b"{", ".json", "damaged captions"),
        (b'{"caption": 3}', ".json", "damaged captions"),
        (b"[" * 100_000, ".json", "damaged captions"),
        (b" \n\n", ".txt", "no caption"),
        (b"", ".txt", "no caption"),
        (b'{"url": "http://a"}', ".json", "no caption"),
        (b"null", ".json", "no caption"),
        (b"", ".json", "no caption"),
        (rb'{"caption": "\ud83d"}', ".json", "no caption"),
        ("\u200b\ufeff\u2800\u3164\n\u200d".encode(), ".txt", "no caption"),
        (b"&nbsp;", ".txt", "no caption"),
        (b"a", ".txt", "caption too short"),
        (b"a red red star", ".txt", "caption too long"),
    ],
)
def test_bad_captions(content: bytes, suffix: str, cause: str) -> None:
    cleaning = CleaningConfig(min_caption=2, max_caption=10)
    with pytest.raises(BadSample, match=r"^where: .+") as error:
        sample_caption(captions_in(content, suffix, "where"), "where", cleaning, RNG)
    assert error.value.cause == cause
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.cause, again.why, str(again)) == (cause, error.value.why, str(error.value))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["a", None, " b "], ["a", "b"]),
        ({"caption": None, "text": "a"}, ["a"]),
        ({"captions": [""], "prompt": "a"}, ["a"]),
        ({"caption": "a", "text": "other"}, ["a"]),
        ({"caption": ["a", "\u200b"]}, ["a"]),
    ],
)
def test_captions_in_json(found: Any, expected: list[str]) -> None:
    assert captions_in(json.dumps(found).encode(), ".json", "") == expected


@pytest.mark.parametrize("cleaned", [True, False])
def test_half_a_character_stops_no_reading(cleaned: bool) -> None:
    captions = captions_in(rb'{"caption": "a blue \ud83d star"}', ".json", "")
    cleaning = CleaningConfig(clean_captions=cleaned)
    assert sample_caption(captions, "", cleaning, RNG) == "a blue \ufffd star"
    assert sample_caption(["a \udcff star"], "", cleaning, RNG) == "a \ufffd star"


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("a car\non the street", {"caption": "a car\non the street"}, ["a car\non the street"]),
        ("a car\na van", {"caption": "a van", "url": "x"}, ["a car", "a van"]),
        ("old", {"caption": "new"}, ["new"]),
        ("old", ["new", "newer"], ["new", "newer"]),
        ("a car", {"url": "x"}, ["a car"]),
        ("a car", {"caption": 3}, ["a car"]),
        (" \n", {"caption": "a car"}, ["a car"]),
    ],
)
def test_of_two_files_of_captions_the_json_decides(
    text: str, found: Any, expected: list[str]
) -> None:
    files = {".txt": text.encode(), ".json": json.dumps(found).encode()}
    assert captions_among(files, "") == expected
    assert captions_among(dict(reversed(files.items())), "") == expected


def test_one_damaged_file_of_captions_does_not_hide_the_other() -> None:
    bad = b"\xff"
    assert captions_among({".txt": bad, ".json": b'"a"'}, "") == ["a"]
    assert captions_among({".txt": b"a", ".json": bad}, "") == ["a"]
    assert captions_among({".txt": b"", ".json": b"{}"}, "") == []
    with pytest.raises(BadSample, match=r"x: .*decode"):
        captions_among({".txt": bad, ".json": b"[]"}, "x")


def test_of_several_captions_one_that_fits_is_picked() -> None:
    cleaning = CleaningConfig(min_caption=4, max_caption=6)
    for i in range(20):
        captions = ["a", "a star", "a red star"]
        assert sample_caption(captions, "", cleaning, random.Random(i)) == "a star"


def test_captions_are_cleaned_unless_disabled() -> None:
    dirty = "  schÃ¶n &amp;amp; good  \t day "
    assert clean(dirty) == "schön & good day"
    assert sample_caption([dirty], "", NO_CLEANING, RNG) == "schön & good day"
    raw = CleaningConfig(clean_captions=False)
    assert sample_caption([dirty], "", raw, RNG) == "schÃ¶n &amp;amp; good  \t day"


@pytest.mark.parametrize(
    ("size", "cause"),
    [
        ((20, 10), None),
        ((21, 10), "too elongated"),
        ((10, 21), "too elongated"),
        ((9, 9), "too small"),
        ((9, 40), "too small"),
    ],
)
def test_images_are_taken_by_their_shape(size: tuple[int, int], cause: str | None) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    cleaning = CleaningConfig(min_side=10)
    if cause is None:
        assert read_image(buffer.getvalue(), "", cleaning).size == size
        return
    with pytest.raises(BadSample) as error:
        read_image(buffer.getvalue(), "a.png", cleaning)
    assert error.value.cause == cause
    assert f"a.png: {size[0]} × {size[1]}, and --m" in str(error.value)


@pytest.mark.parametrize(
    ("decode_size", "expected"),
    [(0, (640, 480)), (481, (640, 480)), (240, (320, 240)), (121, (320, 240)), (60, (80, 60))],
)
def test_jpegs_are_decoded_no_larger_than_is_needed(
    decode_size: int, expected: tuple[int, int]
) -> None:
    x, y = np.meshgrid(np.arange(640) * 255 / 640, np.arange(480) * 255 / 480)
    whole = Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8))
    buffer = io.BytesIO()
    whole.save(buffer, "JPEG", quality=95)
    small = read_image(buffer.getvalue(), "", NO_CLEANING, decode_size)
    assert small.size == expected
    assert min(small.size) >= decode_size or small.size == whole.size
    reference = np.asarray(whole.resize(expected, Image.Resampling.BOX), int)
    assert np.abs(np.asarray(small, int) - reference).mean() < 2


def test_turned_jpegs_are_decoded_small_and_upright() -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    stored = Image.new("RGB", (640, 480), "white")
    stored.paste("red", (0, 0, 320, 240))
    stored.save(buffer, "JPEG", quality=95, exif=exif)
    upright = read_image(buffer.getvalue(), "", NO_CLEANING, 100)
    assert upright.size == (120, 160)
    assert upright.getpixel((90, 40))[1] < 60  # the red corner went to the right
    assert upright.getpixel((30, 40))[1] > 200


@pytest.mark.parametrize(
    "wrong",
    [{"max_aspect": 0.5}, {"min_caption": 5, "max_caption": 4}, {"max_bad_fraction": 5}],
)
def test_impossible_rules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is .*, expected"):
        CleaningConfig(**wrong)  # type: ignore[arg-type]


# Several sources


def test_sources_and_weights() -> None:
    assert split_names("a") == (["a"], None)
    assert split_names("a,b{1,2}.tar") == (["a", "b{1,2}.tar"], None)
    assert split_names("a::2,pipe:cat b::0.5") == (["a", "pipe:cat b"], [2.0, 0.5])
    long = "https://host/a.tar?token=" + "x" * 5000
    assert split_names(long) == ([long], None)
    own = "pipe:ssh host 'cat a,b::2 {x}'"
    assert split_names(f'{own}::2,pipe:cat "c,d" e::1') == ([own, 'pipe:cat "c,d" e'], [2, 1])
    assert split_names("mum's,http://[::1]:80/a.tar") == (
        ["mum's", "http://[::1]:80/a.tar"],
        None,
    )
    with pytest.raises(ValueError, match=r"the quote ' is never closed"):
        split_names("pipe:cat 'a,b")
    for wrong in ("a::2,b", "a::x,b::1", "a::0,b::1", "a::-1,b::1", "a::nan,b::1"):
        with pytest.raises(ValueError, match="expected a weight for each source"):
            split_names(wrong)


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (1, 3, 0.5), (0.1, 0.2, 0.7, 1e-3)])
def test_each_source_has_its_share_at_every_moment(weights: tuple[float, ...]) -> None:
    counts = [0] * len(weights)
    for position in range(3000):
        source, before = weighted_round_robin(position, weights)
        assert before == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (position + 1) * weight / sum(weights)) < len(weights)


def test_several_sources_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("a", 3), ("b", 2)):
        for i in range(count):
            write_image(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(f"{name}{i}")
    write_image(tmp_path / "b" / "alone.png")
    data = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    joined = open_source(data)
    assert isinstance(joined, Mixture)
    assert [joined.find(i).caption(RNG) for i in range(5)] == ["a0", "a1", "a2", "b0", "b1"]
    assert sorted(joined.index_at(position, 0) for position in range(5, 10)) == list(range(5))
    assert [pair.cause for pair in joined.skipped] == ["no caption"]
    assert joined.find(4).name == str(tmp_path / "b" / "1.png")
    weighted = open_source(f"{tmp_path / 'a'}::1,{tmp_path / 'b'}::3")
    assert isinstance(weighted, Mixture)
    names = [weighted.find(weighted.index_at(p, 0)).caption(RNG)[0] for p in range(40)]
    assert names.count("b") == 30
    mixed = open_source(f"toybox::1,{tmp_path / 'a'}::1", options=ReadOptions(size=32))
    assert isinstance(mixed, Mixture)
    assert [mixed.index_at(position, 0) for position in (1, 3, 5)] == [0, 1, 2]  # Toybox, in order
    assert mixed.find(0).image().size == (32, 32)
    rng = random.Random(0)
    names = [mixed.find(mixed.random_index(rng)).name for _ in range(50)]
    assert 15 < sum(name.endswith(".png") for name in names) < 35
    with pytest.raises(ValueError, match="one of the sources is endless; add weights"):
        open_source(f"toybox,{tmp_path / 'a'}")
    write_image(tmp_path / "pipe" / "a.png")  # a folder, in spite of its name
    (tmp_path / "pipe" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("pipe")) == 1
    with pytest.raises(ValueError, match=r"no data at '.*gone'"):
        open_source(f"{tmp_path / 'a'},{tmp_path / 'gone'}")


@pytest.mark.parametrize("scheme", ["https://host/a.tar?token=", "pipe:curl -H token:", ""])
def test_long_sources_are_no_paths(scheme: str, tmp_path: Path) -> None:
    data = scheme + "x" * 5000
    assert open_codes(data, "train", tmp_path, DVAE(DVAEConfig(width=4))) is None
    if scheme:
        assert isinstance(open_source(data), StreamingShards)
    else:
        with pytest.raises(ValueError, match="no data at 'xxx"):
            open_source(data)


# What is skipped


def skip(cause: str, where: str = "a") -> SkippedSample:
    return SkippedSample(cause, where, "why")


def test_skipped_samples_are_recorded_once_and_printed_once_per_cause(tmp_path: Path) -> None:
    printed: list[str] = []
    file = tmp_path / "run" / "skipped.jsonl"
    stats = SkipStats(1.0, file, printed.append)
    stats.add(10, [skip("too small", "a"), skip("no caption", "b")])
    stats.add(10, [skip("too small", "a"), skip("too small", "c")])
    assert str(stats) == "3 × too small, 1 × no caption"
    assert [line.split(";")[0] for line in printed] == [
        "Skipping a (too small: why)",
        "Skipping b (no caption: why)",
    ]
    with file.open("a") as broken:
        broken.write('{"cau\n')
    SkipStats(1.0, file, printed.append).add(1, [skip("too small", "c"), skip("too small", "é")])
    lines = file.read_text().splitlines()
    assert [json.loads(line)["where"] for line in lines if line.endswith("}")] == list("abcé")


def test_damage_stops_and_rules_do_not() -> None:
    for cause in DAMAGE:
        stats = SkipStats(0.05, report=lambda _: None)
        for _ in range(18):
            stats.add(50, [skip(cause)] * 2)
        stats.add(45, [])  # of fewer than 1,000 nothing is concluded
        with pytest.raises(ValueError, match=rf"56 of 1001 samples \(5.6%\).*56 × {cause}"):
            stats.add(0, [skip(cause)] * 20)
        stats.add(1000, [])  # what is long ago is forgotten
    for cause in RULES:
        stats = SkipStats(0.0, report=lambda _: None)
        stats.open(10, [skip(cause)] * 90)
        stats.add(10, [skip(cause)] * 2000)


def test_a_dataset_that_is_mostly_damaged_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"6 of 100 samples \(6.0%\) .*--max-bad-fraction 0.05"):
        SkipStats(0.05, report=lambda _: None).open(94, [skip("no caption")] * 6)
    SkipStats(0.05, report=lambda _: None).open(95, [skip("no caption")] * 5)


def test_shards_take_little_memory(tmp_path: Path) -> None:
    from dalle1.commands.toybox import main as write_toybox

    words = ["--out", str(tmp_path), "--num-scenes", "5", "--size", "32"]
    write_toybox(words)
    source = open_source(str(tmp_path))
    assert isinstance(source, IndexedShards)
    assert source.entries.nbytes == 56 * len(source)
    assert source.name(3) == f"000000003.png in {tmp_path}/00000.tar"
