"""What every test shares: no network, few threads, and GPU tests that skip with a reason."""

import os

import pytest
import torch

# Read by the Hugging Face libraries when they are first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure() -> None:
    """Keep torch to a few threads: the tensors are tiny, and more only wait for each other."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainings give memory back: what one keeps, all tests after it would hold, too."""
    for module in ("dalle1.training.loop", "dalle1.data.codes"):
        monkeypatch.setattr(f"{module}.keep_freed_memory", lambda: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
