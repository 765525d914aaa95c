"""Images as people have them: metadata, modes, sizes and damage, read in one way everywhere."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle1.data import images
from dalle1.data.cleaning import IMAGE_SUFFIXES
from dalle1.data.images import (
    load_image_file,
    mask_to_sample,
    open_image,
    read_image_file,
    save_png,
    to_rgb,
)
from dalle1.data.skipped import BadSample

ROOT = Path(__file__).resolve().parents[2]
RED, WHITE, CLEAR = (255, 0, 0, 255), (255, 255, 255, 255), (0, 0, 0, 0)


def encoded(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def top_red(mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (16, 8), "white")
    image.paste("red", (0, 0, 16, 4))
    return image


def exif(*entries: bytes, values: bytes = b"") -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + values


def with_chunk(
    png: bytes, kind: bytes, content: bytes, checksum: int | None = None, at: bytes = b"IDAT"
) -> bytes:
    start = png.index(at) - 4
    crc = zlib.crc32(kind + content) if checksum is None else checksum
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    return png[:start] + chunk + png[start:]


def png_header(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return with_chunk(PNG[:8] + chunks + PNG[PNG.index(b"IDAT") - 4 :], b"tEXt", b"a\0b")


ORIENTATION_6 = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
# A signed rational of −1/0 cannot be written again, as Pillow does to remove the orientation.
ODD_RATIONAL = struct.pack("<HHII", 0x11A, 10, 1, 38)
PNG = encoded(top_red(), "PNG")


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (
            encoded(
                top_red(),
                "JPEG",
                exif=exif(ORIENTATION_6, ODD_RATIONAL, values=bytes(4) + struct.pack("<ii", -1, 0)),
            ),
            (8, 16),
        ),
        (encoded(top_red(), "JPEG", exif=exif(struct.pack("<HHIHH", 0x112, 3, 1, 9, 0))), (16, 8)),
        (encoded(top_red(), "JPEG", exif=b"Exif\0\0MM\0\0nothing of the kind"), (16, 8)),
        (with_chunk(PNG, b"eXIf", b"no TIFF at all"), (16, 8)),
        (with_chunk(PNG, b"tEXt", b"a\0b", checksum=1), (16, 8)),
        (with_chunk(PNG, b"iCCP", b"a\0\0nothing"), (16, 8)),
        (with_chunk(PNG, b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))), (16, 8)),
    ],
)
def test_damaged_metadata_loses_no_image(content: bytes, size: tuple[int, int]) -> None:
    image = to_rgb(open_image(content, "x"), "x")
    assert image.size == size
    end = (0, 0) if size == (8, 16) else (15, 7)  # turned, red is at the right
    assert image.getpixel(end) == pytest.approx((255, 255, 255), abs=12)


def as_jpeg(kind: int, content: bytes) -> bytes:
    jpeg = encoded(top_red(), "JPEG", exif=exif(ORIENTATION_6, values=bytes(4)))
    return jpeg[:2] + struct.pack(">BBH", 0xFF, 0xE0 + kind, len(content) + 2) + content + jpeg[2:]


@pytest.mark.parametrize(
    "content",
    [
        *(
            with_chunk(PNG, kind, content, at=at)
            for kind, content in (
                *((b"gAMA", b""), (b"cHRM", b"\0"), (b"pHYs", b"\0"), (b"acTL", b"\0")),
                *((b"fcTL", b"\0"), (b"tRNS", b"\0"), (b"iTXt", b"x")),
                (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))),
            )
            for at in (b"IDAT", b"IEND")
        ),
        *(
            as_jpeg(kind, content)
            for kind, content in (
                *((2, b"ICC_PROFILE\0"), (14, b"Adobe"), (0, b"JFIF")),
                (13, b"Photoshop 3.0\08BIM\x03\xed"),
            )
        ),
    ],
)
def test_metadata_that_is_too_short_loses_no_image(content: bytes) -> None:
    image = to_rgb(open_image(content, "x"))
    assert sorted(image.size) == [8, 16]
    end = (0, 0) if image.width == 8 else (15, 7)
    assert image.size == ((16, 8) if content.startswith(b"\x89PNG") else (8, 16))
    assert image.getpixel(end) == pytest.approx((255, 255, 255), abs=12)


def test_a_pgm_of_16_bits_is_scaled_by_its_range() -> None:
    for value, expected in ((100, 0), (257, 1), (30_000, 117)):
        content = b"P5 8 8 65535\n" + value.to_bytes(2, "big") * 64
        assert to_rgb(open_image(content, "x")).getpixel((0, 0)) == (expected,) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_once(orientation: int, tmp_path: Path) -> None:
    info = Image.Exif()
    info[0x0112] = orientation
    (tmp_path / "a.png").write_bytes(encoded(top_red(), "PNG", exif=info))
    once = read_image_file(tmp_path / "a.png")
    assert to_rgb(once).tobytes() == once.tobytes()
    again = to_rgb(load_image_file(tmp_path / "a.png"))
    assert (again.size, again.tobytes()) == (once.size, once.tobytes())
    with Image.open(tmp_path / "a.png") as lazy:
        assert to_rgb(lazy).tobytes() == once.tobytes()


def test_good_images_keep_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(to_rgb(open_image(encoded(image, "PNG"), "")), pixels)
    jpeg = encoded(image, "JPEG", quality=90)
    with Image.open(io.BytesIO(jpeg)) as plain:
        assert np.array_equal(to_rgb(open_image(jpeg, "")), plain)


def premultiplied(image: Image.Image) -> Image.Image:
    return image.convert("RGBa")


@pytest.mark.parametrize(
    "make",
    [
        lambda image: image,
        premultiplied,
        lambda image: image.convert("LA").convert("La"),
        lambda image: image.convert("LA"),
        lambda image: Image.open(io.BytesIO(encoded(image, "GIF"))),
        lambda image: Image.open(io.BytesIO(encoded(image, "WEBP", lossless=True))),
        lambda image: Image.open(io.BytesIO(encoded(image.quantize(4), "PNG"))),
    ],
)
def test_what_is_transparent_becomes_white(make: Callable[[Image.Image], Image.Image]) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste(CLEAR, (0, 0, 4, 8))
    pixels = to_rgb(make(image))
    assert pixels.mode == "RGB"
    assert pixels.getpixel((1, 1)) == (255, 255, 255)
    assert pixels.getpixel((6, 6)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 257, 65_535], np.uint16, [0, 1, 255]),
        ([0, 30_000, 65_535], np.int32, [0, 117, 255]),
        ([0, 128, 255], np.int32, [0, 128, 255]),
        ([0, 0.6, 1], np.float32, [0, 153, 255]),
        ([0, 128, 255], np.float32, [0, 128, 255]),
        ([-1, np.nan, 65_535], np.float32, [0, 0, 255]),
        ([0, 0, 0], np.float32, [0, 0, 0]),
    ],
)
def test_grey_is_scaled_by_its_range(values: list[float], kind: type, expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=kind))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert to_rgb(open_image(content, "")).getpixel((0, 0))[0] > 250


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    huge, large = png_header(20_000, 20_000), png_header(10_000, 9_000)
    path = tmp_path / "a.img"
    for content, message in (
        (b"", "file is empty"),
        (b"version https://git-lfs", r"it begins b'version http', as no image does"),
        (encoded(noise, "PNG")[:3000], "its image is damaged: image file is truncated"),
        (encoded(noise, "JPEG")[:900], "its image is damaged: image file is truncated"),
        (PNG[:20], "damaged"),
        (huge, "it has 400 million pixels, expected at most 89 million; make it smaller"),
        (large, "10000 × 9000 are 90 million pixels, expected at most 89 million"),
    ):
        path.write_bytes(content)
        for read in (read_image_file, load_image_file):
            expected = pytest.raises(BadSample, match=f"^{re.escape(str(path))}: .*{message}")
            with expected, warnings.catch_warnings(action="ignore"):
                read(path)
    path.write_bytes(encoded(noise, "JPEG")[:900])
    with Image.open(path) as lazy, pytest.raises(BadSample, match=re.escape(str(path))):
        to_rgb(lazy)  # as a caller of the Python API opens it


def mask(*colours: object, mode: str = "RGBA") -> Image.Image:
    image = Image.new(mode, (len(colours), 1))
    for i, colour in enumerate(colours):
        image.putpixel((i, 0), colour)
    return image


@pytest.mark.parametrize(
    ("image", "expected", "note"),
    [
        (mask(0, 127, 128, 255, mode="L"), [0, 0, 1, 1], ""),
        (mask(0, 1, mode="1"), [0, 1], ""),
        (mask(WHITE, (0, 0, 0, 255)), [1, 0], ""),
        (mask((255, 255, 255, 100), (255, 255, 255, 200)), [0, 1], ""),
        (Image.fromarray(np.array([[0, 512, 65_535]], np.uint16)), [0, 0, 1], ""),
        (Image.fromarray(np.array([[0, 0.4, 1.0]], np.float32)), [0, 0, 1], ""),
        (Image.fromarray(np.array([[0, 1]], np.int32)), [0, 1], ""),
        # OpenAI's editor: erased parts are sampled again, whatever colour is left there.
        (mask(RED, CLEAR, WHITE, (255, 255, 255, 0)), [0, 1, 0, 1], "transparent parts are"),
        (mask((0, 0, 0, 1), CLEAR), [0, 1], "transparent parts are"),
        # Strokes of white on an empty layer.
        (mask(WHITE, CLEAR, (255, 255, 255, 200)), [1, 0, 1], "white parts, not its transparent"),
    ],
)
def test_what_a_mask_marks(image: Image.Image, expected: list[int], note: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        marked = mask_to_sample(image)
    assert marked.dtype == torch.bool
    assert marked[0].int().tolist() == expected
    assert [note in str(warning.message) for warning in caught] == [True] * bool(note)


def test_a_mask_that_is_all_transparent_is_refused() -> None:
    with pytest.raises(ValueError, match="the mask is all transparent, expected opaque parts"):
        mask_to_sample(mask(CLEAR, CLEAR))


def test_a_png_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "a.png"
    save_png(top_red(), path, {"prompt": "🦊 caf\udce9"})
    before = path.read_bytes()
    with Image.open(path) as image:
        assert image.text == {"prompt": "🦊 caf\\udce9"}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (4, 4)), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_png_keeps_its_texts() -> None:
    info = PngInfo()
    info.add_itxt("prompt", "a fox")
    assert open_image(encoded(top_red(), "PNG", pnginfo=info), "").info["prompt"] == "a fox"


def test_every_image_file_is_opened_in_one_module() -> None:
    own = {"dalle1/data/images.py"}
    found = {
        str(path.relative_to(ROOT))
        for folder in ("dalle1", "dvae")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"Image\.open\(|exif_transpose\(", path.read_text(encoding="utf-8"))
    }
    assert found == own


def test_no_decoder_starts_a_program() -> None:
    """Pillow decodes EPS by Ghostscript."""
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 36\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(content)).format == "EPS"
    with pytest.raises(BadSample, match="it begins b'%!PS-Adobe-3"):
        images.open_image(content, "a.png")
    Image.init()
    known = {Image.registered_extensions()[suffix] for suffix in IMAGE_SUFFIXES}
    assert known - {"MPO"} == set(images.FORMATS)  # JPEG's decoder reads it


def test_a_pillow_without_avif_opens_other_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    monkeypatch.setattr(images, "formats", images.formats.__wrapped__)  # not the cached ones
    assert images.open_image(b"P6 1 1 255\nabc", "a.ppm").getpixel((0, 0)) == (97, 98, 99)
