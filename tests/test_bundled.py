"""The model that ships: it loads, samples what a prompt names, and fits in its size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dalle1 import DallE
from dalle1.commands import sample
from dalle1.pipeline import BUNDLED


def test_it_is_small_enough_to_ship() -> None:
    assert sum(f.stat().st_size for f in BUNDLED.rglob("*") if f.is_file()) < 40e6


def test_a_colour_is_sampled_and_ranked() -> None:
    best, *others = DallE.from_pretrained(device="cpu").candidates("a red ball", num_candidates=4)
    assert best.score is not None
    assert all(best.score >= other.score for other in others)
    centre = slice(best.image.width // 3, best.image.width * 2 // 3)
    red, green, blue = np.asarray(best.image)[centre, centre].reshape(-1, 3).mean(0)
    assert red > 1.5 * green
    assert red > 1.5 * blue


@pytest.mark.slow
def test_the_command_of_the_readme(tmp_path: Path) -> None:
    for out in ("one", "two"):
        sample.main(["an avocado armchair", "--num-candidates", "4", "--out", str(tmp_path / out)])
    names = ("grid.png", "00.png", "03.png", "scores.json")
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
