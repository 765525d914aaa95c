"""A lock file that keeps two commands from writing to one folder.

It is a plain file, created exclusively, so that it also works on network drives that have no
`flock`. It names its process. A lock of a process that died is taken over: on this machine at once,
on another one when it was not touched for a while, as a running process touches its lock.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

LOCK_NAME = "run.lock"

TOUCHED_EVERY = 30.0
"""Seconds after which a process touches its lock again."""

STALE_AFTER = 300.0
"""Seconds without a touch after which a process on another machine counts as dead."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Create `folder` and lock it; afterwards remove the lock, and the folder if it is empty.

    Raises: ValueError where another process holds the lock, or nothing can be written there.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, content = folder / LOCK_NAME, json.dumps(_this_process())
    done = Event()
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(lock, content)
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"cannot write to {folder} ({why}); use another --out") from error
        Thread(target=_keep_touching, args=(lock, done), daemon=True).start()
        yield
    finally:
        done.set()
        with suppress(OSError):
            if lock.exists() and lock.read_text(encoding="utf-8") == content:
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

    Returns: None where the system does not reveal it, or the process is dead.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _is_running(pid: int, started: str | None) -> bool:
    if started is not None:
        return _start_of(pid) == started
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _acquire(lock: Path, content: str) -> None:
    for _ in range(10):
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            _remove_stale(lock)
            continue
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        return
    raise ValueError(f"{lock.parent} is in use by other commands; use another --out")


def _remove_stale(lock: Path) -> None:
    """Remove the lock of a dead process; ValueError where its process may be alive."""
    try:
        content, age = lock.read_text(encoding="utf-8"), _age(lock)
    except FileNotFoundError:
        return  # it was just removed
    try:
        owner = json.loads(content)
        pid, host, machine = int(owner["pid"]), str(owner["host"]), owner["machine"]
        running = machine == _machine() and _is_running(pid, owner["started"])
    except (ValueError, TypeError, KeyError):  # it is being written, or was cut off
        owner, pid, host, machine, running = {}, 0, "", None, False
    if running or (machine != _machine() and age < STALE_AFTER):
        name = f"process {pid} on {host}, since {owner['since']}" if owner else "another command"
        raise ValueError(
            f"{lock.parent} is in use by {name}; wait until it ends, or use another --out. If it "
            f"does not run any more, remove {lock}"
        )
    taken = lock.with_name(f".{LOCK_NAME}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.replace(lock, taken)
        if taken.read_text(encoding="utf-8") != content:  # another process was faster
            os.replace(taken, lock)
        else:
            taken.unlink()


def _age(lock: Path) -> float:
    """Return the seconds since the last touch, by the clock of the file system."""
    probe = lock.with_name(f".{LOCK_NAME}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - lock.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _keep_touching(lock: Path, done: Event) -> None:
    while not done.wait(TOUCHED_EVERY):
        with suppress(OSError):
            os.utime(lock)
