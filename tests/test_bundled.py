"""The models that ship: they load, sample what a prompt names, and fit in their sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dalle1.commands import sample
from dalle1.pipeline import BUNDLED
from dalle2.bundled import BUNDLED_UNCLIP
from dalle2.loading import load_pipeline


def test_they_are_small_enough_to_ship() -> None:
    for folder, most in ((BUNDLED, 40e6), (BUNDLED_UNCLIP, 30e6)):
        assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < most


@pytest.mark.parametrize(("name", "side"), [("bundled", 256), ("unclip", 128)])
def test_a_colour_is_sampled_and_ranked(name: str, side: int) -> None:
    model = load_pipeline(name, device="cpu")
    best, *others = model.candidates("a red ball", num_candidates=4)
    assert best.image.size == (side, side)
    assert best.score is not None
    assert all(best.score >= other.score for other in others)
    centre = slice(side // 3, side * 2 // 3)
    red, green, blue = np.asarray(best.image)[centre, centre].reshape(-1, 3).mean(0)
    assert red > 1.5 * green
    assert red > 1.5 * blue


def test_dalle_2_samples_the_same_candidate_alone_and_in_a_batch() -> None:
    model = load_pipeline("unclip", clip="none", device="cpu")
    how = {"num_candidates": 3, "steps": 4}
    together = model.candidates("a red ball", **how)
    (alone,) = model.candidates("a red ball", share=(2, 3), **how)
    assert alone.index == together[2].index == 2
    torch.testing.assert_close(alone.codes, together[2].codes, atol=1e-3, rtol=0)
    assert not torch.allclose(alone.codes, together[1].codes, atol=0.1)


def test_dalle_2_enlarges_what_is_kept() -> None:
    model = load_pipeline("unclip", clip="none", device="cpu")
    (candidate,) = model.candidates("a red ball", num_candidates=1, steps=2)
    (image,) = (found.image for found in model.finished([candidate], upsampler_steps=1))
    assert image.size == (256, 256)


@pytest.mark.slow
def test_the_command_of_the_readme(tmp_path: Path) -> None:
    for out in ("one", "two"):
        sample.main(["an avocado armchair", "--num-candidates", "4", "--out", str(tmp_path / out)])
    names = ("grid.png", "00.png", "03.png", "scores.json")
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
