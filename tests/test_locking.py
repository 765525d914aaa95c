"""Two commands never write to one folder, and a lock never outlives its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_running_process_that_the_system_hides_keeps_its_lock(
    tmp_path: Path, other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked_by(tmp_path, pid=other, started=locking._start_of(other))
    monkeypatch.setattr(locking, "_start_of", lambda pid: None)
    with pytest.raises(ValueError, match=f"in use by process {other} on "), folder_lock(tmp_path):
        pass


def touch_soon(path: Path) -> Thread:
    def touch() -> None:
        time.sleep(0.05)
        os.utime(path)

    thread = Thread(target=touch)
    thread.start()
    return thread


OF_ANOTHER = '{"pid": 1, "host": "node7", "machine": "elsewhere", "started": null}'


@pytest.mark.parametrize(
    ("content", "who"),
    [
        (None, r"process \d+ on node7, since 2"),
        (OF_ANOTHER, "process 1 on node7, since an unknown time"),
        ("", "another command"),
        ("{", "another command"),
        ("\xff\xfe", "another command"),
    ],
)
@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_of_another_machine_holds_while_it_is_touched(
    tmp_path: Path, content: str | None, who: str, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "STALE_AFTER", 10 if alive else 0.1)
    lock = locked_by(tmp_path, machine="elsewhere", host="node7")
    if content is not None:
        lock.write_bytes(content.encode("latin-1"))
    noted = pytest.warns(UserWarning, match=rf"was in use by {who}.* waiting up to")
    if alive:
        thread = touch_soon(lock)
        with noted, pytest.raises(ValueError, match=f"in use by {who}"), folder_lock(tmp_path):
            pass
        thread.join()
        return
    with noted, folder_lock(tmp_path):
        assert os.getpid() == json.loads(lock.read_text())["pid"]


def test_an_old_lock_of_another_machine_is_taken_at_once(tmp_path: Path) -> None:
    lock = locked_by(tmp_path, machine="elsewhere")
    os.utime(lock, (1e9, 1e9))
    with folder_lock(tmp_path):
        assert os.getpid() == json.loads(lock.read_text())["pid"]


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_held_lock_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "TOUCHED_EVERY", 0.01)
    with folder_lock(tmp_path):
        lock = tmp_path / LOCK_NAME
        os.utime(lock, (0, 0))
        wait_until(lambda: lock.stat().st_mtime > 0)


def test_a_lock_that_was_taken_over_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "TOUCHED_EVERY", 0.01)
    notes: list[str] = []
    monkeypatch.setattr(locking.warnings, "warn", lambda text, **_: notes.append(text))
    lock = tmp_path / LOCK_NAME
    with folder_lock(tmp_path):
        lock.write_text("another")
        wait_until(lambda: bool(notes))
        assert "another command took" in notes[0]
        os.utime(lock, (0, 0))
        time.sleep(0.05)
        assert lock.stat().st_mtime == 0
    assert lock.read_text() == "another"


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> int:
        raise OSError(30, "Read-only file system", str(path))

    (tmp_path / "file").touch()
    for folder in (tmp_path / "file/run", tmp_path / "run"):
        monkeypatch.setattr(Path, "write_text", refuse)
        with pytest.raises(ValueError, match=r"cannot write to .*run \(.*\); use another --out"):
            folder_lock(folder).__enter__()
    assert entries(tmp_path) == ["file"]


def test_errors_within_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), folder_lock(tmp_path):
        (tmp_path / "nothing").read_text()


def test_a_lock_is_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it creates the lock leaves a whole one, or none."""

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(os, "link", kill)
        with pytest.raises(Killed), folder_lock(tmp_path):
            pass
    assert entries(tmp_path) == []


def test_a_drive_without_links_has_locks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match="in use by process"), folder_lock(tmp_path):
            pass
    assert entries(tmp_path) == []
