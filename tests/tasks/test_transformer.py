"""The validation of a transformer's training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1.model.transformer import TransformerLoss
from dalle1.tasks.transformer import TransformerTask


def test_the_caption_gap_is_what_another_pairs_caption_costs() -> None:
    def loss(text: Tensor, codes: Tensor, weight: float) -> TransformerLoss:
        miss = (text[:, 0] - codes[:, 0]).abs().float().mean()
        return TransformerLoss(total=miss, text=miss, image=1 + miss)

    task: Any = TransformerTask.__new__(TransformerTask)
    task.device = torch.device("cpu")
    task.config = SimpleNamespace(precision="fp32", text_weight=1 / 8)
    numbers = 3 * torch.arange(40)[:, None]  # two batches
    task.held = {"text": numbers, "codes": numbers}
    values = dict(task.validate(SimpleNamespace(loss=loss, config=SimpleNamespace(image_len=4))))
    assert values["image"] == pytest.approx(1.0)
    # Each is 3 from the one before it, and the first 117 from the last: 6 × 39 / 40.
    assert values["caption_gap"] == pytest.approx(4 * 6 * 39 / 40)
