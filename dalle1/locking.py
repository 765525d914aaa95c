"""A lock file that keeps two commands from writing to one folder.

It is a plain file, created exclusively, so that it also works on network drives that have no
`flock`. It names its process. A lock of a process that died is taken over: on this machine at once,
on another one when it is not touched for a while, as a running process touches its lock. Whoever
wants it waits for that long, so that a job that was moved to another machine resumes.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from dalle1.json_files import parse_json

LOCK_NAME = "run.lock"

TOUCHED_EVERY = 30.0
"""Seconds after which a process touches its lock again."""

STALE_AFTER = 300.0
"""Seconds without a touch after which a process on another machine counts as dead."""


class FolderInUse(ValueError):
    """Another process holds the lock."""


@contextmanager
def folder_lock(folder: Path, name: str = LOCK_NAME, *, wait: bool = False) -> Iterator[None]:
    """Create `folder` and lock it; afterwards remove the lock, and the folder if it is empty.

    Args:
        name: name of the lock file; locks of different names do not exclude each other.
        wait: wait until another process, or thread, releases the lock.

    Raises: ValueError where another process holds the lock, or nothing can be written there.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, content = folder / name, json.dumps(_this_process())
    done = Event()
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not _acquire(lock, content, wait):
                time.sleep(0.02)
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"cannot write to {folder} ({why}); use another --out") from error
        Thread(target=_keep_touching, args=(lock, content, done), daemon=True).start()
        yield
    finally:
        done.set()
        with suppress(OSError):
            if lock.exists() and _read(lock) == content:
                lock.unlink()
            for path in created:
                path.rmdir()


def _this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "machine": _machine(),
        "started": _start_of(os.getpid()),
        "id": uuid4().hex,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _machine() -> str:
    """Return what identifies the running system whose process numbers this process sees."""
    name = platform.node()
    with suppress(OSError):  # not on Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{name} {boot} {os.readlink('/proc/self/ns/pid')}"
    return name


def _start_of(pid: int) -> str | None:
    """Return when a process started, which tells it from a later one of the same number.

    Returns: "" where it is dead and only its parent has not noticed, None where the system does not
        reveal it: Linux may hide the processes of other users.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] == "Z" else fields[19]


def _is_running(pid: int, started: str | None) -> bool:
    if started is not None and (found := _start_of(pid)) is not None:
        return found == started
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _acquire(lock: Path, content: str, wait: bool) -> bool:
    """Create the lock; False where another process holds it, and `wait` is set."""
    for _ in range(10):
        try:
            _create(lock, content)
        except FileExistsError:
            with suppress(FileNotFoundError, *([FolderInUse] if wait else [])):
                _remove_stale(lock)  # not found where it was just removed
            continue
        return True
    if wait:
        return False
    raise FolderInUse(f"{lock.parent} is in use by other commands; use another --out")


def _create(lock: Path, content: str) -> None:
    """Create the lock with its content; FileExistsError where it exists.

    It appears whole, by a link: a process that is killed between creating and writing it would
    leave an empty lock, which belongs to no known process.
    """
    whole = lock.with_name(f".{lock.name}.{uuid4().hex[:8]}")
    try:
        whole.write_text(content, encoding="utf-8")
        try:
            os.link(whole, lock)
            return
        except FileExistsError:
            raise
        except (OSError, NotImplementedError):  # a drive without links
            pass
    finally:
        whole.unlink(missing_ok=True)
    with lock.open("x", encoding="utf-8") as file:
        file.write(content)


def _remove_stale(lock: Path) -> None:
    """Remove the lock of a dead process; ValueError where its process is alive."""
    content = _read(lock)
    try:
        owner = parse_json(content, dict)
        pid, host, machine = int(owner["pid"]), str(owner["host"]), owner["machine"]
        name = f"process {pid} on {host}, since {owner.get('since', 'an unknown time')}"
        here = machine == _machine()
        running = _is_running(pid, owner["started"]) if here else _is_touched(lock, name)
    except (ValueError, TypeError, KeyError):  # it is being written, or was cut off
        name = "another command"
        running = _is_touched(lock, name)
    if running:
        raise FolderInUse(
            f"{lock.parent} is in use by {name}; wait until it ends, or use another --out. If it "
            f"does not run any more, remove {lock}"
        )
    taken = lock.with_name(f".{lock.name}.{os.getpid()}")
    os.replace(lock, taken)
    if _read(taken) != content:  # another process was faster
        os.replace(taken, lock)
    else:
        taken.unlink()


def _read(lock: Path) -> str:
    return lock.read_text(encoding="utf-8", errors="replace")


def _is_touched(lock: Path, owner: str) -> bool:
    """Wait until a process on another machine touches its lock, or long enough did not."""
    before, age = lock.stat().st_mtime_ns, _age(lock)
    if age < STALE_AFTER:
        warnings.warn(
            f"{lock.parent} was in use by {owner}, {max(0, age):.0f} s ago; waiting up to "
            f"{STALE_AFTER - age:.0f} s to see whether it still is",
            stacklevel=2,
        )
    while _age(lock) < STALE_AFTER:
        time.sleep(min(1, STALE_AFTER / 50))
        if lock.stat().st_mtime_ns != before:
            return True
    return False


def _age(lock: Path) -> float:
    """Return the seconds since the last touch, by the clock of the file system."""
    probe = lock.with_name(f".{lock.name}.{uuid4().hex[:8]}")
    try:
        probe.touch()
        return probe.stat().st_mtime - lock.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _keep_touching(lock: Path, content: str, done: Event) -> None:
    while not done.wait(TOUCHED_EVERY):
        with suppress(OSError):
            if _read(lock) != content:
                warnings.warn(
                    f"another command took {lock.parent} over while this one was suspended, or the "
                    "drive was; stop one of the two",
                    stacklevel=1,
                )
                return
            os.utime(lock)
