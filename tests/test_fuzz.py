"""The fuzzer finds what it looks for: each kind of failure is planted, and reported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fuzz import harness
from fuzz.harness import Runner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, uses alarms")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.chdir(tmp_path)
    runner = Runner(tmp_path)
    runner.clear()
    (runner.scratch / "in" / "a.txt").write_text("a")
    return runner


def stop(code: int, text: str) -> None:
    print(text, file=sys.stderr)
    raise SystemExit(code)


FAILURES: dict[str, tuple[Callable[[], object], str]] = {
    "traceback": (lambda: {}["x"], "KeyError: 'x'"),
    "exit code": (lambda: stop(1, "error: no such file here"), "exit code 1"),
    "no line": (lambda: stop(2, ""), "0 lines of error"),
    "two lines": (lambda: stop(2, "error: a line of text\nerror: another"), "2 lines of error"),
    "short line": (lambda: stop(2, "error: x"), "an error of 8 letters"),
    "input": (lambda: Path("../in/a.txt").unlink(), "changed /in/a.txt"),
    "outside": (lambda: Path("../../b.txt").write_text("b"), "outside the output folder"),
    "link": (lambda: Path("../in/a.txt").chmod(0), "os.chmod, outside the output folder"),
    "secret": (lambda: Path("../../secret.json").read_text(), "leads out of its folder"),
    "program": (lambda: subprocess.run(["true"], check=True), "subprocess.Popen"),
    "memory": (lambda: b"x" * (1 << 27), "GB"),
    "hang": (lambda: time.sleep(9), "Hang: no end after 1 s"),
}


@pytest.mark.parametrize("name", [*FAILURES])
def test_a_planted_failure_is_reported(
    name: str, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, expected = FAILURES[name]
    if name == "memory":
        monkeypatch.setattr(harness, "MAX_BYTES", harness.peak_bytes(reset=True) + (1 << 25))
    if name == "hang":
        monkeypatch.setattr(harness, "MAX_SECONDS", 1)

    def run(words: Sequence[str]) -> None:
        act()

    runner.run = run
    assert expected in runner.check(["sample"])[0]


def test_success_and_one_line_are_no_failures(runner: Runner) -> None:
    def run(words: Sequence[str]) -> None:
        out = runner.scratch / "out"
        out.mkdir()
        (out / "a.png").write_bytes(b"x")
        (out / "b.png").symlink_to("a.png")
        os.replace(out / "a.png", out / "c.png")
        if "bad" in words:
            stop(2, "note: a note\nerror: width is 0, expected more")

    runner.run = run
    assert runner.check(["sample"]) == ("", "success")
    assert runner.check(["sample", "bad"]) == ("", "error: width is 0, expected more")


def test_every_target_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One input of each of the quick targets; `make fuzz` runs all of them for longer."""
    pytest.importorskip("hypothesis", reason="needs the package hypothesis; `make test` has it")
    from fuzz.__main__ import fuzz

    monkeypatch.chdir(tmp_path)
    names = ["prompts", "images", "captions", "shards", "archives"]
    done = fuzz(names, tmp_path, minutes=0, first=0)
    assert done.failures == {}, done.report()
    assert done.inputs == dict.fromkeys(names, 1)
