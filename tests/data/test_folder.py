"""Folders as people have them: which files are images, which captions, and what is passed over."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from dalle1.data.cleaning import IMAGE_SUFFIXES, NO_CLEANING, read_image
from dalle1.data.skipped import SkippedSample, SkipStats
from dalle1.data.sources.base import is_hidden


def test_image_suffixes_are_what_pillow_reads() -> None:
    Image.init()
    formats = Image.registered_extensions()
    formats[".mpo"] = "JPEG"  # opened as such
    programs = {"EPS", "WMF"}  # Pillow hands them to other programs
    stubs = {"BUFR", "GRIB", "HDF5", "MPEG", "PDF", "PALM"}
    assert {formats[suffix] for suffix in IMAGE_SUFFIXES} <= set(Image.OPEN) - programs - stubs
    image = Image.effect_noise((24, 24), 60)
    for suffix in IMAGE_SUFFIXES:
        if formats[suffix] in Image.SAVE:
            buffer = io.BytesIO()
            mode = {".pfm": "F", ".xbm": "1"}.get(suffix, "RGB")
            image.convert(mode).save(buffer, formats[suffix])
            assert read_image(buffer.getvalue(), suffix, NO_CLEANING).width >= 24


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("a.jpg", False),
        ("./a.jpg", False),
        ("../a.jpg", False),
        ("a/.b/c.jpg", True),
        ("._a.jpg", True),
        ("__MACOSX/a.jpg", True),
        (".ipynb_checkpoints/a-checkpoint.jpg", True),
        ("x/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", True),
        ("a..b.jpg", False),
    ],
)
def test_hidden_files(name: str, hidden: bool) -> None:
    assert is_hidden(name) == hidden


def test_a_skipped_sample_may_stand_for_many_files() -> None:
    stats = SkipStats(0.5, report=lambda line: None)
    hidden = SkippedSample("hidden file", "._a.jpg, …", "hidden", 2_000)
    stats.open(10, [hidden, SkippedSample("no caption", "a", "none", 3)])
    assert stats.counts == {"hidden file": 2_000, "no caption": 3}
    with pytest.raises(ValueError, match="11 of 21 samples"):
        stats.open(10, [hidden, SkippedSample("no caption", "a", "none", 11)])
