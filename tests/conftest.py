"""What every test shares: no network, one thread, and GPU tests that skip with a reason."""

import os
from collections.abc import Iterator

# Read by OpenMP and the Hugging Face libraries when they are first imported, also in subprocesses.
# One thread: the tensors are tiny, and beside other load several threads spin for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


def pytest_configure() -> None:
    """Keep torch to one thread, wherever it was imported first."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def memory_is_released() -> Iterator[None]:
    """Release the memory of trainings, also of fixtures: else all later tests hold it.

    A heap that outgrows the machine's memory is not forked any more.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dalle1.console.keep_freed_memory", lambda: None)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` on machines without a GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
