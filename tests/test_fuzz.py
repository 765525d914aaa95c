"""The fuzzer finds what it looks for: each kind of failure is planted, and reported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fuzz import harness
from fuzz.harness import Runner

from dalle1.compression.container import unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, uses alarms")
QUICK = ["prompts", "images", "captions", "shards", "archives"]


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


def spin() -> None:
    while True:
        pass


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
    "hang": (lambda: time.sleep(9), "Hang: no end after 0.2 s harness"),
    "loop": (spin, "Hang: no end after 0.2 s of a processor"),
}


@pytest.mark.parametrize("name", [*FAILURES])
def test_a_planted_failure_is_reported(
    name: str, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, expected = FAILURES[name]
    if name == "memory":
        before = harness.peak_bytes(reset=True)
        act()
        if not before or harness.peak_bytes() - before < 1 << 26:
            pytest.skip("this kernel does not measure the most memory since a reset")
        monkeypatch.setattr(harness, "MAX_BYTES", harness.peak_bytes(reset=True) + (1 << 25))
    limits = {"hang": "MAX_WALL_SECONDS", "loop": "MAX_SECONDS"}
    if name in limits:
        monkeypatch.setattr(harness, limits[name], 0.2)

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


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three inputs of each of the quick targets; `make fuzz` runs all of them for longer."""
    pytest.importorskip("hypothesis", reason="needs the package hypothesis; `make test` has it")
    from fuzz.__main__ import fuzz

    return fuzz(QUICK, tmp_path_factory.mktemp("fuzz"), rounds=1, per_round=2, first=0)


def test_every_target_runs(fuzzed: Any) -> None:
    assert fuzzed.failures == {}, fuzzed.report()
    assert fuzzed.inputs == dict.fromkeys(QUICK, 3)


def test_archives_are_damaged_only_where_they_are_meant_to_be(
    fuzzed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is taken apart and joined again is decompressed, one with shifts, too."""
    from fuzz.models import joined, parts, summed

    assert {archive[3] for archive in fuzzed.world.archives.values()} == {1, 2}
    for name, archive in fuzzed.world.archives.items():
        again = summed(joined(*parts(archive)))
        assert unpack(again, name) == unpack(archive, name)
    monkeypatch.chdir(tmp_path)  # and back
    fuzzed.runner.clear()
    path = fuzzed.runner.scratch / "in" / "a.d1c"
    path.write_bytes(summed(joined(*parts(fuzzed.world.archives["shifts"]))))
    words = ["decompress", str(path), "--model", str(fuzzed.world.model), "--device", "cpu"]
    assert fuzzed.runner.check([*words, "--out", str(path.parent.parent / "out")])[1] == "success"
