"""Schedules by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dalle1.training.config import TrainConfig
from dalle1.training.schedules import Plateau, cosine, warmup_cosine


def test_cosine_by_hand() -> None:
    values = [cosine(s, start=1.0, end=0.2, duration=8) for s in (0, 2, 4, 8, 9, 1000)]
    quarter = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2
    assert values == pytest.approx([1.0, quarter, 0.6, 0.2, 0.2, 0.2])
    assert cosine(0, start=0.0, end=6.6, duration=5000) == 0.0
    assert cosine(5000, start=0.0, end=6.6, duration=5000) == 6.6
    assert cosine(0, start=1.0, end=0.2, duration=0) == 0.2


def test_warmup_cosine_by_hand() -> None:
    def rate(step: int) -> float:
        return warmup_cosine(step, peak=1.0, end=0.1, warmup=4, duration=12)

    assert [rate(s) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rate(8) == pytest.approx(0.55)
    assert [rate(12), rate(13), rate(10**6)] == pytest.approx([0.1] * 3)
    assert warmup_cosine(0, peak=1.0, end=0.1, warmup=0, duration=10) == 1.0
    assert warmup_cosine(5, peak=1.0, end=0.1, warmup=10, duration=10) == pytest.approx(0.6)


def test_plateaus_by_hand() -> None:
    plateau = Plateau(window=2, max_halvings=2, min_drop=0.1)
    halvings = []
    for loss in (5.0, 3.0, 3.0, 3.0, 3.0, 2.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        plateau.update(torch.tensor(loss))
        halvings.append(plateau.halvings)
    # Means of two: 4, 3, 2.95 (not 0.1 lower), 2, 2, 2 (two halvings at most).
    assert halvings == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    plateau.update(torch.tensor(7.0))
    other = Plateau(window=2, max_halvings=2, min_drop=0.1)
    other.load_state_dict(plateau.state_dict())
    assert other.state_dict() == plateau.state_dict()


@pytest.mark.parametrize("rate", [-1e-3, 2.6e281, math.nan])
@pytest.mark.parametrize("name", ["learning_rate", "final_learning_rate"])
def test_rates_that_no_optimizer_can_use_are_refused(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*, expected 0 to 1000"):
        TrainConfig(out=Path("runs"), **{name: rate})
