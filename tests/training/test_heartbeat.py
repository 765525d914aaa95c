"""A process that falls silent is noticed by all others; one that only is slow is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event, Lock
from typing import Any

import pytest

from dalle1.training.heartbeat import Heartbeat

EVERY, SILENCE = 0.01, 0.5


class Store:
    """A store that all processes share, as torch's."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.lock, self.reachable = Lock(), Event()
        self.reachable.set()

    def clone(self) -> Store:
        return self

    def set(self, name: str, value: str) -> None:
        self.reachable.wait()
        with self.lock:
            self.values[name] = value.encode()

    def check(self, names: list[str]) -> bool:
        return all(name in self.values for name in names)

    def get(self, name: str) -> bytes:
        return self.values[name]


class World:
    """Three processes and the errors with which they ended."""

    def __init__(self) -> None:
        self.store, self.errors = Store(), {}
        self.beats = [self.start(rank) for rank in range(3)]

    def start(self, rank: int) -> Heartbeat:
        def leave(message: str) -> None:
            self.errors[rank] = message

        return Heartbeat(self.store, rank, 3, leave, EVERY, SILENCE)

    def ended(self, count: int) -> dict[int, str]:
        deadline = time.monotonic() + 20
        while len(self.errors) < count and time.monotonic() < deadline:
            time.sleep(EVERY)
        return {rank: error[:26] for rank, error in sorted(self.errors.items())}


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.store.reachable.set()
    for beat in world.beats:
        beat.stop()


def test_processes_that_run_are_left_alone(world: World) -> None:
    time.sleep(1.5 * SILENCE)
    assert world.errors == {}


@pytest.mark.parametrize("lost", [1, 2])
def test_a_silent_process_ends_all_others(world: World, lost: int) -> None:
    world.beats[lost].done.set()
    others = {0, 1, 2} - {lost}
    assert world.ended(2) == dict.fromkeys(others, f"rank {lost} has not answered fo")
    assert "same command resumes" in world.errors[0]


def test_a_process_that_finished_is_not_lost(world: World) -> None:
    world.beats[1].stop()
    time.sleep(2 * SILENCE)
    assert world.errors == {}
    world.beats[2].done.set()  # rank 0 watches it now
    assert world.ended(1) == {0: "rank 2 has not answered fo"}


def test_the_store_may_end_with_rank_0(world: World) -> None:
    world.beats[0].stop()
    time.sleep(10 * EVERY)
    world.store.reachable.clear()
    time.sleep(2 * SILENCE)
    assert world.errors == {}


def test_a_store_that_cannot_be_reached_ends_all(world: World) -> None:
    world.store.reachable.clear()
    assert world.ended(3) == dict.fromkeys(range(3), "rank 0 has not answered fo")


def test_failures_of_the_store_are_no_answer(world: World, monkeypatch: Any) -> None:
    def fail(name: str, value: str) -> None:
        raise RuntimeError("connection reset")

    monkeypatch.setattr(world.store, "set", fail)
    assert world.ended(3) == dict.fromkeys(range(3), "rank 0 has not answered fo")
