"""Data: batches from (seed, step) alone, folders and shards of every kind, codes read back."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle1.data import batches, codes, open_source
from dalle1.data.batches import ENDLESS, in_order, index_at
from dalle1.data.codes import CodeSource, EncodeConfig, encode, fingerprint, open_codes
from dalle1.data.images import centre_square, grid, random_crop, to_float, to_pil, to_tensor
from dalle1.data.sources import PICTURES, Folder, Shards, part, to_rgb
from dalle1.data.toybox import Toybox
from dalle1.data.toybox.__main__ import main as write_toybox
from dalle1.training.loop import autocast
from dvae import DVAE, DVAEConfig

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
RNG = random.Random(0)


# Batches


class Numbers:
    """A source of `length` pairs that are their own numbers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def caption(self, index: int, rng: random.Random) -> str:
        return f"number {index}"

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (index % 256, 0, 0))


def number(source: Any, index: int, rng: random.Random) -> Mapping[str, Tensor]:
    assert 0 <= index < len(source)
    return {"index": torch.tensor(index), "draw": torch.tensor(rng.random())}


def take(count: int, length: int = 10, **how: Any) -> list[tuple[list[int], list[float]]]:
    stream: Iterator[Any] = batches(Numbers(length), number, batch_size=4, **how)
    return [(b["index"].tolist(), b["draw"].tolist()) for b in islice(stream, count)]


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = take(9, seed=5)
    assert whole == take(9, seed=5)
    for start in (1, 4):
        assert take(9 - start, seed=5, start=start) == whole[start:]
    assert take(9, seed=6) != whole
    draws = [draw for _, drawn in whole for draw in drawn]
    assert len(set(draws)) == 36  # the same pair in another epoch is drawn anew


def test_workers_change_nothing() -> None:
    assert take(5, start=2, seed=5, num_workers=2) == take(5, start=2, seed=5)


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    seen = [index for indices, _ in take(10, seed=1) for index in indices]
    epochs = [tuple(seen[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert [index_at(place, 10, 1) for place in range(40)] == seen


def test_an_endless_source_is_read_in_order() -> None:
    places = [0, 1, 12345, ENDLESS, ENDLESS + 7]
    assert [index_at(p, ENDLESS, 3) for p in places] == [0, 1, 12345, 0, 7]
    assert index_at(ENDLESS - 1, ENDLESS, 3) == ENDLESS - 1
    assert take(2, length=2**31 - 1, start=1) == take(3, length=2**31 - 1)[1:]
    assert take(1, length=2**31 - 1)[0][0] == [0, 1, 2, 3]


def test_in_order_gives_each_once() -> None:
    stream = in_order(Numbers(20), number, range(3, 14), batch_size=4)
    assert [b["index"].tolist() for b in stream] == [
        *([3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13]),
    ]


def test_parts_do_not_overlap_and_cover_all() -> None:
    for length, held in ((0, 0), (1, 0), (19, 0), (20, 1), (100, 5), (10_240, 512), (50_000, 512)):
        items = list(range(length))
        train, validation = part(items, "train"), part(items, "validation")
        assert train == items[: length - held]
        if held:
            assert train + validation == items
        else:  # too few to spare any: validated on what it was trained on
            assert validation == items


# Pictures


def gradient(width: int, height: int) -> Image.Image:
    """Give a picture whose every pixel says where it was: red is x, green is y."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 77)], -1).astype(np.uint8))


def test_tensors_and_back() -> None:
    image = gradient(7, 5)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == torch.uint8
    assert tensor[:, 4, 6].tolist() == [6, 4, 77]
    floats = to_float(tensor)
    assert floats.max() == 77 / 255
    assert to_pil(floats[None])[0].tobytes() == image.tobytes()
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(to_tensor(to_pil(to_float(every))[0])[None], every)
    outside = to_pil(torch.tensor([-0.5, 1.5, 0.5]).view(1, 3, 1, 1))[0]
    assert outside.getpixel((0, 0)) == (0, 255, 128)


@pytest.mark.parametrize(
    ("width", "height", "left", "top"), [(9, 5, 2, 0), (5, 9, 0, 2), (6, 6, 0, 0), (8, 5, 1, 0)]
)
def test_centre_square(width: int, height: int, left: int, top: int) -> None:
    side = min(width, height)
    cut = centre_square(gradient(width, height), side)
    assert cut.size == (side, side)
    assert cut.getpixel((0, 0)) == (left, top, 77)
    assert cut.getpixel((side - 1, side - 1)) == (left + side - 1, top + side - 1, 77)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (3, 200), (1, 1)])
def test_centre_square_resizes_whole(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (10, 200, 30))
    square = centre_square(image, 16)
    assert square.size == (16, 16)
    assert square.getcolors() == [(256, (10, 200, 30))]


def test_random_crop() -> None:
    image, rng = gradient(12, 9), random.Random(0)
    corners, mirrored = set(), 0
    for _ in range(400):
        crop = to_tensor(random_crop(image, 8, rng)).int()
        assert crop.shape == (3, 8, 8)
        flip = bool(crop[0, 0, 0] > crop[0, 0, 7])
        crop = crop.flip(2) if flip else crop
        left, top = crop[0, 0, 0].item(), crop[1, 0, 0].item()
        assert torch.equal(crop, to_tensor(image)[:, top : top + 8, left : left + 8].int())
        corners.add((left, top))
        mirrored += flip
    assert corners == {(x, y) for x in range(5) for y in range(2)}
    assert 150 < mirrored < 250
    same = [random_crop(image, 8, random.Random(3)).tobytes() for _ in range(2)]
    assert same[0] == same[1]


def test_a_picture_too_small_to_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="12 × 7 is too small to cut 8 × 8"):
        random_crop(gradient(12, 7), 8, RNG)
    assert random_crop(gradient(8, 8), 8, RNG).size == (8, 8)


def test_grid() -> None:
    images = [Image.new("RGB", (10, 6), c) for c in (RED, GREEN, BLUE, RED, GREEN)]
    sheet = grid(images, 3, gap=2)
    assert sheet.size == (3 * 12 + 2, 2 * 8 + 2)
    assert [sheet.getpixel((2 + 12 * i, 2)) for i in range(3)] == [RED, GREEN, BLUE]
    assert [sheet.getpixel((11 + 12 * i, 15)) for i in range(3)] == [RED, GREEN, WHITE]
    assert sheet.getpixel((0, 0)) == sheet.getpixel((12, 5)) == WHITE
    assert grid(images[:2], 8).size == (2 * 14 + 4, 6 + 8)


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
    (tmp_path / "alone2.txt").write_text("no picture")
    source = open_source(str(tmp_path), "train")
    assert isinstance(source, Folder)
    assert len(source) == 4
    rng = random.Random(0)
    assert {source.caption(1, rng) for _ in range(30)} == {"a blue sea", "die blaue See – Ü"}
    assert [source.caption(i, rng) for i in (0, 2, 3)] == ["a red wall", "", "grass"]
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


def test_transparent_places_are_white(tmp_path: Path) -> None:
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
    values = np.array([[0, 257, 0x4040, 30_000, 65_535]], dtype=np.uint16)
    pair(tmp_path, "x.png", Image.fromarray(values), "deep")
    assert np.array(only(tmp_path))[0].tolist() == [[v] * 3 for v in (0, 1, 64, 117, 255)]
    assert to_rgb(Image.fromarray(values.astype(np.int32))).getpixel((3, 0)) == (117,) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_their_exif_says(tmp_path: Path, orientation: int) -> None:
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


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    pair(tmp_path, "bad.png", gradient(64, 64), "x")
    whole = (tmp_path / "bad.png").read_bytes()
    bomb = b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x00"
    for content in (b"", b"not a picture", whole[: len(whole) // 2], bomb):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(ValueError, match="is no readable picture") as error:
            Folder(tmp_path).image(0)
        assert str(tmp_path / "bad.png") in str(error.value)


def test_folders_without_pairs_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pairs in .* 0 pictures .*expected name.jpg"):
        open_source(str(tmp_path))
    Image.new("RGB", (1, 1)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"1 pictures there, none with a caption"):
        open_source(str(tmp_path))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for data in (tmp_path / "gone", tmp_path / "*.tar", tmp_path / "{00..09}.tar", Path(__file__)):
        with pytest.raises(ValueError, match=r"no data at .*expected toybox, a folder") as error:
            open_source(str(data))
        assert str(data) in str(error.value)


def test_toybox_by_name() -> None:
    endless, some = open_source("toybox", size=32, seed=4), open_source("toybox:7", "validation")
    assert isinstance(endless, Toybox)
    assert isinstance(some, Toybox)
    assert len(endless) >= ENDLESS
    assert (endless.size, endless.seed, endless.split) == (32, 4, "train")
    assert (len(some), some.split) == (7, "validation")
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
    assert write_toybox(words) == 0
    return out


def test_shards_of_toybox(shards: Path) -> None:
    train, held = open_source(str(shards), "train"), open_source(str(shards), "validation")
    assert isinstance(train, Shards)
    assert isinstance(held, Shards)
    assert (len(train), len(held)) == (40, 2)
    toybox = Toybox(size=32, num_scenes=42)
    for source, index, scene in ((train, 0, 0), (train, 23, 23), (held, 0, 40), (held, 1, 41)):
        assert source.caption(index, RNG) == toybox.caption(scene)
        assert source.image(index).tobytes() == toybox.image(scene).tobytes()
        assert source.record(index)["caption"] == toybox.caption(scene)


def test_shards_by_pattern(shards: Path) -> None:
    def captions(data: Path) -> list[str]:
        source = open_source(str(data))
        return [source.caption(i, RNG) for i in range(len(source))]

    every = captions(shards)
    assert captions(shards / "*.tar") == captions(shards / "{00000..00002}.tar") == every
    assert captions(shards / "00001.tar") == every[20:39]  # one of twenty is kept for validation
    turned = captions(shards / "{00002,00000}.tar")
    assert turned == [*(Toybox(size=32).caption(i) for i in (40, 41)), *every[:19]]


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
        "./v1.0/a.seg.png": png(BLUE),  # another file of the sample, not its picture
        "v2/a.PNG": png(GREEN),
        "v2/a.Txt": "grün".encode(),
        "v2/b.png": png(BLUE),  # without caption
        "v2/c.txt": b"without picture",
    }
    source = open_source(str(tar(tmp_path / "x.tar", files)))
    assert isinstance(source, Shards)
    assert [source.caption(i, RNG) for i in range(len(source))] == ["red", "grün"]
    assert [source.image(i).getpixel((0, 0)) for i in range(2)] == [RED, GREEN]
    assert source.record(0) == {}


def test_shards_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    pairs = {"a.png": b"no picture", "a.txt": b"a"}
    source = open_source(str(tar(path, pairs)))
    with pytest.raises(ValueError, match=r"pair 0, in .*x.tar, is no readable picture"):
        source.image(0)
    with pytest.raises(ValueError, match=r"no pairs in 1 shards, .*x.tar the first"):
        open_source(str(tar(path, {"a.png": png(RED), "b.txt": b"a"})))
    tar(path, pairs, "w:gz")  # its places are of the content, not of the file
    with pytest.raises(ValueError, match=r"x.tar is no readable tar"):
        open_source(str(path))
    path.write_bytes(b"this is no tar" * 100)
    with pytest.raises(ValueError, match=r"x.tar is no readable tar"):
        open_source(str(path))


def test_every_suffix_is_one_that_pillow_reads() -> None:
    assert set(PICTURES) <= set(Image.registered_extensions())


# Codes


def save_dvae(folder: Path, seed: int = 0) -> DVAE:
    torch.manual_seed(seed)
    model = DVAE(DVAEConfig(image_size=32, width=8, codebook_size=50, code_width=8))
    model.save(folder)
    return DVAE.load(folder)


def encoding(folder: Path, **changes: Any) -> EncodeConfig:
    plain: dict[str, Any] = {
        "dvae": folder / "dvae",
        "out": folder / "codes",
        "data": "toybox:10",
        "captions": 3,
        "batch_size": 3,
        "shard_size": 4,
        "device": "cpu",
        "num_workers": 0,
    }
    return EncodeConfig(**{**plain, **changes})


@pytest.fixture
def encoded(tmp_path: Path) -> tuple[EncodeConfig, DVAE]:
    model, config = save_dvae(tmp_path / "dvae"), encoding(tmp_path)
    encode(config)
    return config, model


def test_codes_are_read_back(encoded: tuple[EncodeConfig, DVAE]) -> None:
    config, model = encoded
    assert [f.name for f in sorted(config.out.glob("*.tar"))] == [f"0000{i}.tar" for i in range(3)]
    source = open_codes(str(config.out), "train", config.dvae)
    assert source is not None
    assert (len(source), source.grid_size) == (10, 4)
    toybox = Toybox(size=32, num_scenes=10)
    for begin, end in ((0, 3), (3, 4), (4, 7), (7, 8), (8, 10)):  # as batches and shards fall
        images = torch.stack([to_tensor(toybox.image(i)) for i in range(begin, end)])
        with autocast(torch.device("cpu"), "bf16"):
            expected = model.encode(to_float(images))
        assert torch.equal(torch.stack([source.code_grid(i) for i in range(begin, end)]), expected)
    assert source.code_grid(0).dtype == torch.int64
    assert len(torch.stack([source.code_grid(i) for i in range(10)]).unique()) > 2
    captions = {source.caption(6, random.Random(i)) for i in range(40)}
    assert captions == {toybox.caption(6, random.Random(f"0/6/{i}")) for i in range(3)}
    assert len(captions) > 1


def test_encoding_goes_on_where_it_stopped(
    encoded: tuple[EncodeConfig, DVAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = encoded
    before = [source_of(config).code_grid(i) for i in range(10)]
    times = {f.name: f.stat().st_mtime_ns for f in config.out.glob("*.tar")}
    (config.out / "00001.tar").unlink()
    (config.out / "00001.partial").write_text("a shard that was never finished")
    read: list[int] = []
    image = Toybox.image
    monkeypatch.setattr(Toybox, "image", lambda self, i: read.append(i) or image(self, i))
    encode(config)
    assert read == [4, 5, 6, 7]
    after = {f.name: f.stat().st_mtime_ns for f in config.out.glob("*.tar")}
    assert {name for name in after if times[name] != after[name]} == {"00001.tar"}
    assert not list(config.out.glob("*.partial"))
    again = [source_of(config).code_grid(i) for i in range(10)]
    assert all(torch.equal(a, b) for a, b in zip(before, again))


def source_of(config: EncodeConfig) -> CodeSource:
    return CodeSource(config.out)


def test_codes_of_another_dvae_or_other_data_are_refused(
    encoded: tuple[EncodeConfig, DVAE], tmp_path: Path
) -> None:
    config, _ = encoded
    save_dvae(tmp_path / "other", seed=1)
    assert fingerprint(tmp_path / "other") != fingerprint(config.dvae)
    with pytest.raises(ValueError, match=r"of another dVAE than .*other; encode the data anew"):
        open_codes(str(config.out), "train", tmp_path / "other")
    for change in ({"dvae": tmp_path / "other"}, {"data": "toybox:11"}, {"seed": 1}):
        with pytest.raises(ValueError, match="holds codes of another dVAE or other data"):
            encode(encoding(tmp_path, **change))
    assert len(source_of(config)) == 10


def test_what_cannot_be_encoded_or_read_is_refused(tmp_path: Path) -> None:
    save_dvae(tmp_path / "dvae")
    with pytest.raises(ValueError, match="'toybox' has no end; name how many"):
        encode(encoding(tmp_path, data="toybox"))
    assert open_codes(str(tmp_path / "codes"), "train", tmp_path / "dvae") is None
    with pytest.raises(ValueError, match="holds no codes"):
        CodeSource(tmp_path / "codes")
    (tmp_path / "codes").mkdir(exist_ok=True)
    (tmp_path / "codes" / "codes.json").write_text(json.dumps({"dvae": "x", "grid_size": 4}))
    with pytest.raises(ValueError, match="stopped before the first shard"):
        CodeSource(tmp_path / "codes")


def test_workers_that_are_spawned_can_encode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where processes are not forked, what prepares a picture is pickled on its way to them.
    given = []

    def watched(source: Any, prepare: Any, *rest: Any) -> Any:
        given.append(pickle.loads(pickle.dumps(prepare))(source, 0, RNG)["images"].shape)
        return in_order(source, prepare, *rest)

    save_dvae(tmp_path / "dvae")
    monkeypatch.setattr(codes, "in_order", watched)
    encode(encoding(tmp_path, data="toybox:1"))
    assert given == [(3, 32, 32)]
