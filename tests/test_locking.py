"""Two commands never write to one folder, and a lock never outlives its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dalle1 import locking
from dalle1.locking import LOCK_NAME, folder_lock


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def locked_by(folder: Path, **owner: Any) -> Path:
    """Write a lock as another process would."""
    with folder_lock(folder):
        content = json.loads((folder / LOCK_NAME).read_text())
    folder.mkdir(exist_ok=True)
    (folder / LOCK_NAME).write_text(json.dumps({**content, **owner}))
    return folder / LOCK_NAME


@pytest.fixture(scope="module")
def other() -> Iterator[int]:
    """The number of a running process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.wait()


def test_a_locked_folder_is_refused(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        message = rf"{tmp_path} is in use by process {os.getpid()} on .*; wait .* remove {tmp_path}"
        with pytest.raises(ValueError, match=message), folder_lock(tmp_path):
            raise AssertionError("both write")
        assert entries(tmp_path) == [LOCK_NAME]
    with folder_lock(tmp_path):
        pass
    assert entries(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_lock_is_removed_after_errors(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), folder_lock(tmp_path):
        raise error
    assert entries(tmp_path) == []


@pytest.mark.parametrize("write", [True, False])
def test_folders_remain_only_where_something_is_in_them(tmp_path: Path, write: bool) -> None:
    with folder_lock(tmp_path / "runs/a"):
        if write:
            (tmp_path / "runs/a/file").touch()
    assert entries(tmp_path) == (["runs"] if write else [])


def test_a_running_process_keeps_its_lock(tmp_path: Path, other: int) -> None:
    locked_by(tmp_path, pid=other, started=locking._start_of(other))
    with pytest.raises(ValueError, match=f"in use by process {other} on "), folder_lock(tmp_path):
        pass
    assert entries(tmp_path) == [LOCK_NAME]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_dead_process_loses_its_lock(tmp_path: Path, other: int) -> None:
    locked_by(tmp_path, pid=other, started="1")  # its number is used again
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert entries(tmp_path) == []


def test_a_dead_process_is_noticed_without_its_start(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    locked_by(tmp_path, pid=process.pid, started=None)
    with folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("content", [None, "", "{"])
@pytest.mark.parametrize(("age", "taken"), [(10, False), (1000, True)])
def test_a_lock_of_another_machine_holds_while_it_is_touched(
    tmp_path: Path, content: str | None, age: float, taken: bool
) -> None:
    lock = locked_by(tmp_path, machine="elsewhere", host="node7")
    if content is not None:  # a half-written one
        lock.write_text(content)
    now = lock.stat().st_mtime
    os.utime(lock, (now - age, now - age))
    if taken:
        with folder_lock(tmp_path):
            assert os.getpid() == json.loads(lock.read_text())["pid"]
        return
    who = "another command" if content is not None else r"process \d+ on node7, since 2"
    with pytest.raises(ValueError, match=f"in use by {who}"), folder_lock(tmp_path):
        pass


def test_a_held_lock_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "TOUCHED_EVERY", 0.01)
    with folder_lock(tmp_path):
        lock = tmp_path / LOCK_NAME
        os.utime(lock, (0, 0))
        while lock.stat().st_mtime == 0:
            pass


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any) -> int:
        raise OSError(30, "Read-only file system", str(path))

    (tmp_path / "file").touch()
    for folder in (tmp_path / "file/run", tmp_path / "run"):
        monkeypatch.setattr(locking.os, "open", refuse)
        with pytest.raises(ValueError, match=r"cannot write to .*run \(.*\); use another --out"):
            folder_lock(folder).__enter__()
    assert entries(tmp_path) == ["file"]


def test_errors_within_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), folder_lock(tmp_path):
        (tmp_path / "nothing").read_text()
