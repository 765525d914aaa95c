"""The number of threads of a command: the processors that others leave idle."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from dalle1.commands import idle_processors
from dalle1.commands.idle_processors import SMALL_STEP, IdleProcessors, threads_of_a_step
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling.decoding import pick_window

SIZE = {"width": 16, "depth": 2, "heads": 2}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Replace time, the own use of processors, and the processors by set ones."""
    now = {"wall": 0.0, "used": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["used"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(os, "nice", lambda _: 0)
    return now


def write_stat(path: Path, idle: list[int], nice: int = 0) -> None:
    """Write the kernel's counts: user, nice, system, idle and I/O wait of each processor."""
    rows = [f"cpu{i} 7 {nice} 5 {ticks} 0 0 0" for i, ticks in enumerate(idle)]
    path.write_text("\n".join(["cpu  28 0 20 1 0 0 0", *rows, "intr 1 2 3"]))


@pytest.mark.parametrize(
    ("idle", "nice", "used", "expected"),
    [
        ([200, 200, 200, 200], 0, 0, 4),
        ([100, 100, 200, 200], 0, 1.9, 4),  # of the two seconds that were used, almost all are own
        ([0, 0, 200, 200], 0, 0, 2),
        ([0, 0, 0, 0, 200], 0, 0, 1),  # another's processor is idle, and none of ours
        ([0, 0, 0, 0], 150, 0, 3),  # niced work yields
    ],
)
def test_processors_that_others_use_are_not_idle(
    clock: dict[str, float],
    tmp_path: Path,
    idle: list[int],
    nice: int,
    used: float,
    expected: int,
) -> None:
    write_stat(tmp_path / "stat", [0] * len(idle))
    idle_ones = IdleProcessors(tmp_path / "stat")
    write_stat(tmp_path / "stat", idle, nice)
    clock.update(wall=2.0, used=used)
    assert idle_ones.count() == expected


def test_niced_work_is_no_less_than_a_niced_command(
    clock: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "nice", lambda _: 19)
    write_stat(tmp_path / "stat", [0] * 4)
    idle_ones = IdleProcessors(tmp_path / "stat")
    write_stat(tmp_path / "stat", [100] * 4, nice=100)
    clock.update(wall=2.0)
    assert idle_ones.count() == 2


@pytest.mark.parametrize("content", ["", "cpu0 1 2", "cpu0 one two three four five"])
def test_without_counts_all_threads_stay(tmp_path: Path, content: str) -> None:
    (tmp_path / "stat").write_text(content)
    for stat in (tmp_path / "stat", tmp_path / "missing"):
        assert IdleProcessors(stat).threads() == torch.get_num_threads()


def test_the_users_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IdleProcessors, "count", lambda _: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert IdleProcessors().threads() == 8
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert IdleProcessors().threads() == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # no more than torch would use
    assert IdleProcessors().threads() == 2


def test_small_steps_take_one_thread() -> None:
    config = TransformerConfig(text_vocab=9, text_len=4, codebook_size=16, grid_size=8, **SIZE)
    model = Transformer(config)
    numbers = sum(p.numel() for p in model.layers.parameters())
    assert pick_window(model, 1) == 8
    assert threads_of_a_step(model, 1, most=4) == 1
    assert threads_of_a_step(model, SMALL_STEP // numbers - 1, most=4) == 1
    assert threads_of_a_step(model, SMALL_STEP // numbers + 1, most=4) == 4


def test_a_short_time_is_measured_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(idle_processors.time, "sleep", slept.append)
    assert (IdleProcessors().count() or 1) >= 1
    assert 0 <= slept[0] <= idle_processors.SHORTEST
