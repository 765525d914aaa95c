"""Folders and shards of every kind."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reading import batches
from torch import Tensor

from dalle1.commands.toybox import main as write_toybox
from dalle1.data import ReadOptions, first_captions, open_source, spec
from dalle1.data.check import main as check
from dalle1.data.images import to_rgb
from dalle1.data.loader import LoaderConfig
from dalle1.data.skipped import BadSample, SkipStats
from dalle1.data.sources.base import ENDLESS
from dalle1.data.sources.folder import Folder
from dalle1.data.sources.indexed_shards import IndexedShards
from dalle1.data.sources.toybox import ToyboxSource
from dalle1.data.spec import expand
from dalle1.toybox import Toybox

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
RNG = random.Random(0)


# Folders


def pair(folder: Path, name: str, image: Image.Image, caption: str, **how: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    image.save(path, **how)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def only(folder: Path) -> Image.Image:
    image = Folder(folder).image(0)
    assert image.mode == "RGB"
    return image


def test_folder(tmp_path: Path) -> None:
    pair(tmp_path, "b.png", Image.new("RGB", (4, 3), BLUE), "  a blue sea \n\n die blaue See – Ü\n")
    pair(tmp_path, "a.PNG", Image.new("RGB", (4, 3), RED), "a red wall")
    pair(tmp_path / "deep" / "er.1", "c.v2.JPeG", Image.new("RGB", (4, 3), GREEN), "grass")
    pair(tmp_path, "d.webp", Image.new("RGB", (4, 3), WHITE), "\n \n", lossless=True)
    Image.new("RGB", (4, 3)).save(tmp_path / "alone.png")
    (tmp_path / "alone2.txt").write_text("no image")
    source = open_source(str(tmp_path), "train")
    assert isinstance(source, Folder)
    assert len(source) == 4
    rng = random.Random(0)
    assert {source.caption(1, rng) for _ in range(30)} == {"a blue sea", "die blaue See – Ü"}
    assert [source.caption(i, rng) for i in (0, 3)] == ["a red wall", "grass"]
    with pytest.raises(BadSample, match=r"d\.txt: there is no text in it"):
        source.caption(2, rng)
    assert [(sample.cause, sample.where) for sample in source.skipped] == [
        ("caption without an image", "alone2.txt"),
        ("no caption", str(tmp_path / "alone.png")),
    ]
    assert [source.image(i).getpixel((0, 0)) for i in (0, 1, 2)] == [RED, BLUE, WHITE]
    assert np.abs(np.array(source.image(3), int) - GREEN).max() < 4  # a JPEG


def test_folder_keeps_its_end_for_validation(tmp_path: Path) -> None:
    for i in range(21):
        pair(tmp_path, f"{i:02d}.png", Image.new("RGB", (1, 1)), str(i))
    captions = {
        split: [source.caption(i, RNG) for i in range(len(source))]
        for split in ("train", "validation")
        for source in [Folder(tmp_path, split)]
    }
    assert captions == {"train": [str(i) for i in range(20)], "validation": ["20"]}


def test_stage_1_needs_no_captions(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a red square")
    assert len(open_source(str(tmp_path))) == 1
    assert len(open_source(str(tmp_path), options=ReadOptions(captions=False))) == 2


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 1), (*RED, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    grey = Image.new("LA", (2, 1), (40, 255))
    grey.putpixel((1, 0), (40, 0))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((1, 0), 1)
    for image, how, expected in (
        (clear, {}, [RED, WHITE]),
        (half, {}, [(127, 127, 127)] * 2),
        (grey, {}, [(40, 40, 40), WHITE]),
        (palette, {}, [RED, GREEN]),
        (palette, {"transparency": 1}, [RED, WHITE]),
        (clear.convert("RGB"), {"transparency": RED}, [WHITE, (0, 0, 0)]),
    ):
        pair(tmp_path, "x.png", image, "x", **how)
        assert [only(tmp_path).getpixel((x, 0)) for x in (0, 1)] == expected, (image.mode, how)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    pair(tmp_path, "x.png", Image.new("L", (2, 2), 90), "grey")
    assert only(tmp_path).getpixel((0, 0)) == (90, 90, 90)
    pair(tmp_path, "x.png", Image.new("1", (2, 2), 1), "black and white")
    assert only(tmp_path).getpixel((0, 0)) == WHITE
    (tmp_path / "x.png").unlink()
    pair(tmp_path, "x.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "print", quality=100)
    assert np.abs(np.array(only(tmp_path), int) - RED).max() < 4
    (tmp_path / "x.jpg").unlink()
    pair(tmp_path, "x.gif", Image.new("RGB", (2, 2), BLUE), "gif")
    assert only(tmp_path).getpixel((1, 1)) == BLUE


def test_grey_of_16_bits_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 257, 0x4040, 30_000, 65_535]] * 3, dtype=np.uint16)
    pair(tmp_path, "x.png", Image.fromarray(values), "deep")
    assert np.array(only(tmp_path))[0].tolist() == [[v] * 3 for v in (0, 1, 64, 117, 255)]
    assert to_rgb(Image.fromarray(values.astype(np.int32))).getpixel((3, 0)) == (117,) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_by_their_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (16, 8), WHITE)
    upright.paste(RED, (0, 0, 8, 4))
    turn = Image.Transpose
    stored = {  # how a camera that was held so would have stored it
        1: [],
        2: [turn.FLIP_LEFT_RIGHT],
        3: [turn.ROTATE_180],
        4: [turn.FLIP_TOP_BOTTOM],
        5: [turn.TRANSPOSE],
        6: [turn.ROTATE_90],
        7: [turn.TRANSVERSE],
        8: [turn.ROTATE_270],
    }[orientation]
    image = upright
    for transpose in stored:
        image = image.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pair(tmp_path, "x.png", image, "x", exif=exif)
    assert only(tmp_path).size == (16, 8)
    assert only(tmp_path).tobytes() == upright.tobytes()


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    pair(tmp_path, "bad.png", Image.linear_gradient("L"), "x")
    whole = (tmp_path / "bad.png").read_bytes()
    bomb = b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x00"
    for content, cause in (
        (b"", "empty file"),
        (b"not an image", "not an image"),
        (whole[: len(whole) // 2], "damaged image"),
        (whole[:20], "damaged image"),
        (bomb, "too many pixels"),
    ):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(BadSample) as error:
            Folder(tmp_path).image(0)
        assert error.value.cause == cause
        assert str(tmp_path / "bad.png") in str(error.value)


def test_an_error_names_what_a_folder_without_pairs_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pairs in .* 0 images, .*expected name\.jpg"):
        open_source(str(tmp_path))
    Image.new("RGB", (1, 1)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"1 images, all without a caption"):
        open_source(str(tmp_path))


def test_missing_data_is_refused(tmp_path: Path) -> None:
    for data in (tmp_path / "gone", tmp_path / "*.tar", tmp_path / "{00..09}.tar", Path(__file__)):
        with pytest.raises(ValueError, match=r"no data at .*expected toybox, a folder") as error:
            open_source(str(data))
        assert str(data) in str(error.value)


def test_toybox_by_name() -> None:
    endless = open_source("toybox", options=ReadOptions(size=32, seed=4))
    some = open_source("toybox:7", "validation")
    assert isinstance(endless, ToyboxSource)
    assert isinstance(some, ToyboxSource)
    assert len(endless) >= ENDLESS
    toybox = endless.toybox
    assert (toybox.size, toybox.seed, toybox.split) == (32, 4, "train")
    assert (len(some), some.toybox.split) == (7, "validation")
    for wrong in ("toybox:abc", "toybox:-3", "toybox:1.5"):
        with pytest.raises(ValueError, match=f"'{wrong}', expected toybox or toybox:N"):
            open_source(wrong)
    with pytest.raises(ValueError, match="num_scenes 0"):
        open_source("toybox:0")


# Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    words = ["--out", str(out), "--num-scenes", "42", "--size", "32", "--shard-size", "20"]
    write_toybox(words)
    return out


def test_shards_of_toybox(shards: Path) -> None:
    train, held = open_source(str(shards), "train"), open_source(str(shards), "validation")
    assert isinstance(train, IndexedShards)
    assert isinstance(held, IndexedShards)
    assert (len(train), len(held)) == (40, 2)
    toybox = Toybox(size=32, num_scenes=42)
    for source, index, scene in ((train, 0, 0), (train, 23, 23), (held, 0, 40), (held, 1, 41)):
        assert source.caption(index, RNG) == toybox.caption(scene)
        assert source.image(index).tobytes() == toybox.image(scene).tobytes()


def test_shards_by_pattern(shards: Path) -> None:
    def captions(data: Path) -> list[str]:
        source = open_source(str(data))
        return [source.caption(i, RNG) for i in range(len(source))]

    every = captions(shards)
    assert captions(shards / "*.tar") == captions(shards / "{00000..00002}.tar") == every
    assert captions(shards / "00001.tar") == every[20:39]  # one of twenty is kept for validation
    turned = captions(shards / "{00002,00000}.tar")
    assert turned == [*(Toybox(size=32).caption(i) for i in (40, 41)), *every[:19]]


@pytest.mark.parametrize("name", ["se[t]", "a {0..1}", "x::y", "a, b", "what?*"])
def test_what_exists_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for shard in ("00000.tar", "00001.TAR", "v[1].tar"):
        tar(folder / shard, {"a.png": png(RED), "a.txt": b"red"})
    found = {
        data: len(open_source(f"{folder}{data}"))
        for data in ("", "/00000.tar", "/v[1].tar", "/{00000..00000}.tar", "/*.tar", "/*[0v]*")
        if "," not in name or not data.startswith(("/{", "/*"))  # a comma separates patterns
    }
    every = {"": 3, "/00000.tar": 1, "/v[1].tar": 1, "/{00000..00000}.tar": 1, "/*.tar": 2}
    assert found == {data: {**every, "/*[0v]*": 3}[data] for data in found}


def test_backslashes_are_no_escapes() -> None:
    shards = [rf"C:\data\{i:05d}.tar" for i in range(2)]
    assert expand(r"C:\data\{00000..00001}.tar") == shards
    assert open_source(r"pipe:awk '\{print\}' {0..1}").groups == [  # type: ignore[attr-defined]
        ["pipe:awk '{print}' 0", "pipe:awk '{print}' 1"]
    ]


def test_what_is_beside_shards_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.tar", "._a.tar", "._b.tar", "more/c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tar(tmp_path / name, {"a.png": png(RED), "a.txt": b"red"})
    for name in ("0.JPG", "captions.csv", "1.tar.gz", "a_stats.json", "more/1.png"):
        (tmp_path / name).write_bytes(b"")
    found = [
        f"._a.tar, ._b.tar (hidden file: hidden shards in {tmp_path})",
        f"1.tar.gz (other file: in {tmp_path}, compressed; decompress what is a shard)",
        f"0.JPG, captions.csv, more/1.png, … (other file: in {tmp_path}, beside shards, and not "
        "read)",
    ]
    assert [str(sample) for sample in open_source(str(tmp_path)).skipped] == found
    monkeypatch.setattr(spec, "INDEXED_BYTES", 10)
    source, lines = open_source(str(tmp_path)), list[str]()
    assert [str(sample) for sample in source.skipped] == found
    config = LoaderConfig(batch_size=1, stats=SkipStats(1.0, report=lines.append))
    next(source.loader(lambda sample, rng: {"x": 1}, config).batches(0))
    assert [line.partition(" (")[0] for line in lines] == [
        *("Skipping ._a.tar, ._b.tar", "Skipping 1.tar.gz")
    ]


def test_compressed_shards_are_refused_with_what_to_do(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar.gz", {"a.png": png(RED), "a.txt": b"red"}, "w:gz")
    with pytest.raises(ValueError, match=r"0\.tar\.gz is compressed, .*'pipe:gzip -dc .*\*\.gz'"):
        open_source(f"{tmp_path}/*.gz")
    assert first_captions(open_source(f"pipe:gzip -dc {tmp_path}/*.gz"), 2) == ["red"]


def tar(path: Path, files: Mapping[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_in_folders_and_with_more_files(tmp_path: Path) -> None:
    files = {
        "./v1.0/a.png": png(RED),
        "./v1.0/a.txt": b" red \n",
        "./v1.0/a.seg.png": png(BLUE),  # another file of the sample, not its image
        "v2/a.PNG": png(GREEN),
        "v2/a.Txt": "grün".encode(),
        "v2/b.png": png(BLUE),  # without caption
        "v2/c.txt": b"without image",
    }
    source = open_source(str(tar(tmp_path / "x.tar", files)))
    assert isinstance(source, IndexedShards)
    assert [source.caption(i, RNG) for i in range(len(source))] == ["red", "grün"]
    assert [source.image(i).getpixel((0, 0)) for i in range(2)] == [RED, GREEN]


def test_shards_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    pairs = {"a.png": b"not an image", "a.txt": b"a"}
    source = open_source(str(tar(path, pairs)))
    with pytest.raises(BadSample, match=r"a\.png in .*x\.tar: it begins b'not an image'"):
        source.image(0)
    with pytest.raises(
        ValueError, match=r"no usable samples in 1 shards, .*x.tar the first.*no caption"
    ):
        open_source(str(tar(path, {"a.png": png(RED), "b.txt": b"a"})))
    tar(path, pairs, "w:gz")  # its offsets are of the content, not of the file
    with pytest.raises(ValueError, match=r"no usable samples .*x\.tar \(unreadable shard"):
        open_source(str(path))
    path.write_bytes(b"this is no tar" * 100)
    with pytest.raises(ValueError, match=r"no usable samples .*x\.tar \(unreadable shard"):
        open_source(str(path))


def test_a_missing_shard_is_skipped_by_a_training(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tar(tmp_path / f"{name}.tar", {f"{i}.png": png(RED) for i in range(4)})
    source = open_source(str(tmp_path), options=ReadOptions(captions=False))

    def prepare(sample: Any, rng: random.Random) -> Mapping[str, Tensor]:
        return {"pixel": torch.tensor(sample.image().getpixel((0, 0)))}

    (tmp_path / "b.tar").unlink()
    stream = batches(source, prepare, batch_size=1)
    skipped = [sample for batch in islice(stream, 20) for sample in batch.skipped]
    assert {(sample.cause, sample.where) for sample in skipped} == {
        ("unreadable file", str(tmp_path / "b.tar"))
    }
    assert isinstance(source, IndexedShards)
    assert source.name(5) == f"pair 5 in {tmp_path}/b.tar"


@pytest.mark.parametrize("flag", ["--shown", "--limit"])
def test_check_reads_and_shows_at_least_one_pair(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        check(["toybox:2", "--out", str(tmp_path / "check"), "--num-workers", "0", flag, "0"])
    assert exit_.value.code == 2
    assert f"{flag} is 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_shards_of_a_pattern_are_named(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streaming:
        monkeypatch.setattr("dalle1.data.spec.INDEXED_BYTES", 0)
    gone = [3, 40, 99]
    for number in set(range(100)) - {*gone}:
        tar(tmp_path / f"{number:05d}.tar", {f"{number:05d}.png": png(RED)})
    data, out = f"{tmp_path}/{{00000..00099}}.tar", tmp_path / "check"
    check([data, "--no-captions", "--out", str(out), "--num-workers", "0"])
    assert json.loads((out / "check.json").read_text())["pairs"] == 97
    named = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(pair["cause"], pair["where"]) for pair in named] == [
        ("unreadable shard", f"{tmp_path}/{number:05d}.tar") for number in gone
    ]
