"""Free memory: the page cache is available at any time, so it counts as free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dalle1 import devices

MIB = 2**20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 900 MiB available, of which 100 MiB are unused, without cgroups."""
    monkeypatch.setattr(devices, "MEMINFO", tmp_path / "meminfo")
    found = [(tmp_path / f"v{i}", *names) for i, (_, *names) in enumerate(devices.CGROUPS)]
    monkeypatch.setattr(devices, "CGROUPS", found)
    kib = {"MemFree": 100 * 1024, "MemAvailable": 900 * 1024}
    (tmp_path / "meminfo").write_text("".join(f"{k}:  {v} kB\n" for k, v in kib.items()))
    return tmp_path


def limit(folder: Path, *names: str, maximum: int | str, used: int, cache: int) -> None:
    folder.mkdir()
    (folder / names[0]).write_text(f"{maximum}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


def free() -> int:
    return devices.free_memory(torch.device("cpu"))


def test_the_page_cache_is_free(system: Path) -> None:
    assert free() == 900 * MIB


@pytest.mark.parametrize("version", [0, 1])
def test_a_container_has_its_own_limit(system: Path, version: int) -> None:
    folder, *names = devices.CGROUPS[version]
    limit(folder, *names, maximum=500 * MIB, used=480 * MIB, cache=400 * MIB)
    assert free() == 420 * MIB


def test_a_container_without_a_limit(system: Path) -> None:
    folder, *names = devices.CGROUPS[0]
    limit(folder, *names, maximum="max", used=480 * MIB, cache=400 * MIB)
    assert free() == 900 * MIB


def test_systems_without_these_files(system: Path) -> None:
    (system / "meminfo").unlink()
    assert free() > 0
