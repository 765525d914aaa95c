"""What every test shares: no network, few threads, and GPU tests that skip with a reason."""

import os
from collections.abc import Iterator

import pytest
import torch

# Read by the Hugging Face libraries when they are first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure() -> None:
    """Keep torch to a few threads: the tensors are tiny, and more only wait for each other."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="session")
def memory_is_given_back() -> Iterator[None]:
    """Let trainings give memory back, those of fixtures, too: else all tests after them hold it.

    A heap that outgrows the machine's memory is not forked any more.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in ("dalle1.device", "dalle1.training.loop", "dalle1.data.codes"):
            patch.setattr(f"{module}.keep_freed_memory", lambda: None)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
