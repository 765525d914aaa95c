"""The benchmarks: values by hand, results of other settings are refused, none hangs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_best_of_a_group_is_the_one_with_the_highest_score() -> None:
    best_of = benchmark("rerank").best_of
    correct, scores = [1, 0, 0, 1, 0, 0, 1, 0], [0.1, 0.9, 0.3, 0.2, 0.4, 0.5, 0.8, 0.7]
    assert best_of(correct, scores, 1) == 3 / 8
    assert best_of(correct, scores, 2) == 1 / 4  # the second, third, sixth and seventh
    assert best_of(correct, scores, 4) == 1 / 2  # the second and the seventh
    assert best_of(correct, scores, 8) == 0


def test_reranking_resumes_and_refuses_results_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rerank, scored = benchmark("rerank"), []

    def score_candidates(
        model: Any, classifier: Any, prompt: Any, seed: int
    ) -> dict[str, list[float]]:
        scored.append(prompt.text)
        return {"correct": [1.0, 0.0] * 32, "CLIP": [1.0, 0.0] * 32, "likelihood": [0.0, 1.0] * 32}

    model = SimpleNamespace(from_pretrained=lambda *_, **__: None)
    monkeypatch.setattr(rerank, "DallE", model)
    monkeypatch.setattr(rerank, "load_classifier", lambda path: None)
    monkeypatch.setattr(rerank, "score_candidates", score_candidates)
    monkeypatch.setattr(rerank, "plot", lambda *_: None)
    command = ["--out", str(tmp_path), "--num-prompts", "2"]
    rerank.main(command)
    rerank.main(command)  # resumes: nothing is left to generate
    assert len(scored) == 4
    curves = json.loads((tmp_path / "rerank.json").read_text())
    assert curves["training"] == {
        "at random": [0.5] * 4,
        "by CLIP": [0.5, 1, 1, 1],
        "by likelihood": [0.5, 0, 0, 0],
    }
    capsys.readouterr()
    with pytest.raises(SystemExit):
        rerank.main([*command, "--clip", "another"])
    printed = capsys.readouterr().err
    assert "holds results of other settings (clip differ)" in printed
    assert printed.count("\n") == 1
    (tmp_path / "classifier").write_bytes(b"another")
    monkeypatch.setattr(rerank, "CLASSIFIER", tmp_path / "classifier")
    with pytest.raises(SystemExit):
        rerank.main(command)
    assert "holds results of other settings (classifier differ)" in capsys.readouterr().err
    assert len(scored) == 4


def test_comparing_losses_refuses_results_of_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = benchmark("clip_losses")
    command = ["--out", str(tmp_path), "--batch-sizes"]
    for loss in ("infonce", "sigmoid"):
        (tmp_path / f"{loss}-4").mkdir()
        both = dict.fromkeys(losses.KINDS, 0.5)
        (tmp_path / f"{loss}-4" / "retrieval.json").write_text(json.dumps(both))
    losses.plot = lambda *_: None
    losses.main([*command, "4"])
    with pytest.raises(SystemExit):
        losses.main([*command, "4", "--pairs", "8"])
    assert "holds results of other settings (pairs differ)" in capsys.readouterr().err


class Process:
    """Stand-in of a busy process."""

    started: list[Process]

    def __init__(self, words: list[str]) -> None:
        self.words, self.is_running = words, True
        Process.started.append(self)

    def kill(self) -> None:
        self.is_running = False

    def wait(self) -> None:
        assert not self.is_running  # otherwise it would wait for ever


def test_nothing_is_left_busy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Process.started = []
    loaded, measured = benchmark("loaded"), []

    def run(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert options["timeout"] == loaded.LONGEST
        running = sum(process.is_running for process in Process.started)
        measured.append(running)
        return subprocess.CompletedProcess(words, 0, f'{{"seconds": {1 + running}, "threads": 2}}')

    monkeypatch.setattr(loaded.subprocess, "Popen", Process)
    monkeypatch.setattr(loaded.subprocess, "run", run)
    loaded.main(["--busy", "2", "--work", "training"])
    assert measured == [0, 2]
    assert capsys.readouterr().out.split()[-1] == "3.0"
    assert not any(process.is_running for process in Process.started)

    def fail(words: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(words, loaded.LONGEST)

    monkeypatch.setattr(loaded.subprocess, "run", fail)
    with pytest.raises(subprocess.TimeoutExpired), loaded.busy(1):
        loaded.in_fresh_process("training", 1)
    assert not any(process.is_running for process in Process.started)


def test_a_busy_process_ends_by_itself() -> None:
    loaded = benchmark("loaded")
    source = loaded.BUSY.replace(str(loaded.LONGEST), "0.01")
    assert source != loaded.BUSY
    exec(source, {})


def test_the_rows_of_a_gpu_are_commands_that_the_benchmarks_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, calls = tmp_path / "python", tmp_path / "calls"
    script = f"#!/bin/sh\nfor x; do printf '%s|' \"$x\"; done >> {calls}; echo >> {calls}\n"
    python.write_text(script)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path), "PEERS": "1"}
    subprocess.run([ROOT / "benchmarks" / "gpu_rows.sh"], env=environment, check=True)
    lines = [line for line in calls.read_text().splitlines() if line.startswith("benchmarks/")]
    parsed, parse = [], argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, args: list[str] | None = None) -> None:
        parsed.append(parse(parser, args))
        raise InterruptedError

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for line in lines:
        monkeypatch.setattr("sys.argv", line.rstrip("|").split("|"))
        with pytest.raises(InterruptedError):
            benchmark(Path(sys.argv[0]).stem).main()
    assert len(parsed) == 6
