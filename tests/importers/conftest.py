"""Random numbers that are the same in every run."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)
