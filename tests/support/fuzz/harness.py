"""Run a command in this process and report everything that is wrong with the way it ends.

A command may succeed, or print one line that begins with `error:` and exit with code 2. It may not
end in any other exception, take longer than `MAX_SECONDS` or more memory than `MAX_BYTES`, write
outside its output folder, change its input, start a program, or connect to a network.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dalle1.cli import SUBCOMMANDS
from dalle1.console import notes

MAX_SECONDS = 60
"""Of a processor: other work on the machine does not count."""
MAX_WALL_SECONDS = 600
MAX_BYTES = 4 << 30
MAX_LETTERS = 2000
"""Longest line of an error; it may quote a file's path."""

EXIT_CODES = {"check": (0, 1, 2), "filter": (0, 1, 2)}
"""Subcommand → exit codes; 1 where a dataset is damaged."""

_WRITES = {
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.link": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
}
"""Audit event → its arguments that are paths which change."""
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


@dataclass
class Watch:
    """What the audit hook looks for while a command runs."""

    out: Path
    secret: Path
    may_start_programs: bool = False
    active: bool = False

    def __post_init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _STARTS and not self.may_start_programs:
            self.found.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
            # A folder is opened so for a file without a name.
            if flags & (os.O_WRONLY | os.O_RDWR) and not os.path.isdir(path):
                self._changes(path, "opened to write")
            elif os.path.realpath(path) == str(self.secret):
                self.found.append(f"{path} leads out of its folder and was read")
        elif event in _WRITES:
            for i in _WRITES[event]:
                if isinstance(arguments[i], (str, bytes, os.PathLike)):
                    path = os.fsdecode(arguments[i])
                    if event in ("os.remove", "os.rmdir") and (arguments[1] or -1) >= 0:
                        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
                    self._changes(path, event)

    def _changes(self, path: str, how: str) -> None:
        where = os.path.realpath(os.path.dirname(os.path.abspath(path)))
        whole = os.path.join(where, os.path.basename(path))
        if whole != str(self.out) and not whole.startswith(f"{self.out}/") and whole != os.devnull:
            self.found.append(f"{path}: {how}, outside the output folder")


_watches: list[Watch] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watches:
        watch(event, arguments)


_hooked: list[bool] = []


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Let a watch see what this process opens, changes and starts."""
    if not _hooked:
        sys.addaudithook(_audit)  # it stays for the rest of the process
        _hooked.append(True)
    _watches.append(watch)
    watch.active = True
    try:
        yield
    finally:
        watch.active = False
        _watches.remove(watch)


class Hang(BaseException):
    """A command takes too long."""


@contextlib.contextmanager
def limited_time(seconds: float, wall_seconds: float) -> Iterator[None]:
    """Interrupt the block by `Hang`; where that is of no use, end the process with a traceback.

    Args:
        seconds: most time of a processor.
        wall_seconds: most time, whatever else the machine does.
    """

    def stop(number: int, _: object) -> None:
        used = f"{seconds} s of a processor" if number == signal.SIGPROF else f"{wall_seconds} s"
        raise Hang(f"no end after {used}")

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, stop) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)
    faulthandler.dump_traceback_later(wall_seconds + 60, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
        faulthandler.cancel_dump_traceback_later()


def limit_memory(most: int = MAX_BYTES + (2 << 30)) -> None:
    """Let allocations of this process fail before they take the memory of the machine."""
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def peak_bytes(*, reset: bool = False) -> int:
    """Return the most memory that this process had since the last reset; 0 where unknown."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(found[1]) << 10
    return 0


def snapshot(folder: Path) -> dict[str, str]:
    """Return the type and content of all that is in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = "folder"
    return found


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command line into the name of the subcommand and its flags."""
    length = next(n for n in (2, 1) if " ".join(words[:n]) in SUBCOMMANDS)
    return " ".join(words[:length]), [*words[length:]]


def run_main(words: Sequence[str]) -> None:
    """Run a subcommand as `dalle1` does, without the settings of a whole process."""
    name, flags = command_of(words)
    with notes():
        import_module(SUBCOMMANDS[name][0]).main(flags)


def ending_of(words: Sequence[str], run: Callable[[Sequence[str]], None]) -> tuple[str, str]:
    """Run a command; return what is wrong with the way it ends, or "", and its last line."""
    name, _ = command_of(words)
    code, errors, trace = 0, io.StringIO(), ""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            with limited_time(MAX_SECONDS, MAX_WALL_SECONDS):
                run(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else -1
        except BaseException as error:  # Rust's panics are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            trace = f"{type(error).__name__}: {error}"[:300] + f" {_frames(error)}"
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error:")]
    last = lines[-1] if lines else "success" if code == 0 else f"exit code {code}"
    if trace:
        return trace, last
    if code not in EXIT_CODES.get(name, (0, 2)):
        return f"exit code {code}: {errors.getvalue()[-300:]!r}", last
    if code == 2 and (len(lines) != 1 or "Traceback" in errors.getvalue()):
        return f"{len(lines)} lines of error: {errors.getvalue()[-500:]!r}", last
    if code == 2 and not 10 < len(last) <= MAX_LETTERS:
        return f"an error of {len(last)} letters: {last[:200]!r}", last
    return "", last


def _frames(error: BaseException) -> str:
    """Return where in this project an exception was raised, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if re.search(r"/dalle[12]/|/dvae/", f.filename)] or frames
    return " < ".join(f"{Path(f.filename).name}:{f.name}:{f.lineno}" for f in reversed(own[-3:]))


class Runner:
    """Runs inputs in a folder of their own, one after another."""

    def __init__(self, root: Path) -> None:
        """Prepare `root`, whose folder scratch holds the input and output of one command."""
        self.root = root.resolve()
        self.scratch = self.root / "scratch"
        self.secret = self.root / "secret.json"
        self.secret.write_text('{"secret": true}')
        self.current = self.root / "current.txt"
        self.run: Callable[[Sequence[str]], None] = run_main

    def clear(self) -> None:
        """Remove what the last command left."""
        os.chdir(self.root)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for name in ("in", "cwd"):
            (self.scratch / name).mkdir(parents=True)
        os.chdir(self.scratch / "cwd")

    def check(self, words: Sequence[str], *, may_start_programs: bool = False) -> tuple[str, str]:
        """Run a command whose input is in scratch/in and whose output goes to scratch/out.

        Returns: what is wrong, or ""; and how it ended.
        """
        self.current.write_text(repr(words))
        watch = Watch(self.scratch / "out", self.secret, may_start_programs)
        before = snapshot(self.scratch)
        known = peak_bytes(reset=True)
        with watching(watch), warnings.catch_warnings():
            wrong, last = ending_of(words, self.run)
        peak = peak_bytes()
        shutil.rmtree(self.scratch / "out", ignore_errors=True)
        after = snapshot(self.scratch)
        changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        changed = [name for name in changed if not name.startswith(f"{self.scratch}/out")]
        problems = [wrong] if wrong else []
        problems += sorted(set(watch.found))[:3]
        if changed:
            problems.append(f"changed {changed[0].removeprefix(str(self.scratch))}")
        if known and peak > MAX_BYTES:
            problems.append(f"took {peak / 1e9:.1f} GB")
        return "; ".join(problems), last
