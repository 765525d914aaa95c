"""Kill a training at random moments and fill its disk: no step and no checkpoint is lost.

A tiny transformer is trained once without interruption. The same training is then killed by SIGKILL
and SIGTERM and restarted; at last its disk is full, by a limit on the size of files. After each
fault every checkpoint must load, and every logged step must have the values of the uninterrupted
training. No checkpoint that was due may be missing; after SIGTERM no step may be.

FAULTS=25 in the environment kills 25 times instead of 3.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from experiments import losses
from safetensors.torch import load_file

from dalle1.model.transformer import Transformer
from dalle1.training.checkpoint import TENSORS_NAME, load_checkpoint
from dvae import DVAE, DVAEConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals"),
]
ROOT = Path(__file__).resolve().parents[2]
FAULTS = int(os.environ.get("FAULTS", 3))
STEPS, SAVE_EVERY = max(30, 10 * FAULTS), 5
FLAGS = [
    *("--model.width", "64", "--model.depth", "4", "--model.heads", "4", "--precision", "fp32"),
    *("--data", "toybox:64", "--device", "cpu", "--num-workers", "1", "--batch-size", "4"),
    *("--log-every", "1", "--save-every", str(SAVE_EVERY), "--validate-every", "35", "--keep", "2"),
    *("--prompts", "a red star", "--accumulate", "2", "--schedule", "plateau"),
    *("--plateau-window", "20", "--vocab-captions", "64", "--optimizer", "adamw"),
]


class Runs:
    """A training's command, its uninterrupted run, and the problems found so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        DVAE(DVAEConfig(image_size=32, width=8, codebook_size=16, code_width=8)).save(
            folder / "dvae"
        )
        self.problems: list[str] = []
        self.saved: dict[Path, int] = {}
        process, began = self.begin(folder / "uninterrupted")
        assert process.wait() == 0
        self.duration = time.perf_counter() - began
        self.expected = losses(folder / "uninterrupted")
        assert list(self.expected) == [*range(1, STEPS + 1)]

    def start(self, out: Path, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        """Start the training, or resume it."""
        flags = [*FLAGS, "--out", str(out), "--dvae", str(self.folder / "dvae")]
        return subprocess.Popen(
            [sys.executable, "train_transformer.py", "toy", *flags, "--steps", str(STEPS)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=before,
        )

    def begin(self, out: Path) -> tuple[subprocess.Popen[str], float]:
        """Start the training and wait until it rewrites its log; return that time, too."""
        log = out / "log.jsonl"
        inode = log.stat().st_ino if log.exists() else None
        process = self.start(out)
        while process.poll() is None and not (log.exists() and log.stat().st_ino != inode):
            time.sleep(0.01)
        return process, time.perf_counter()

    def check(self, out: Path, fault: str) -> int:
        """Check everything that is there after a fault; return the step that it resumes from."""
        for step, values in losses(out).items():
            if values != self.expected[step]:
                self.problems.append(f"{fault}: step {step} differs")
        for folder in [f for f in out.glob("step-*") if f.is_dir()]:
            try:
                Transformer.load(folder)
                Transformer.load(folder / "raw")
                load_file(folder / TENSORS_NAME)
            except Exception as error:
                self.problems.append(f"{fault}: {folder} does not load: {error}")
        state = load_checkpoint(out)
        found = state["step"] if state else 0
        logged = max(losses(out), default=0)
        # Of the step in whose checkpoint it was killed, the one before counts.
        if found < (logged - 1) // SAVE_EVERY * SAVE_EVERY or found < self.saved.get(out, 0):
            self.problems.append(f"{fault}: {logged} steps logged, {found} saved")
        self.saved[out] = found
        return found

    def kill(self, out: Path, number: signal.Signals, after: float) -> bool:
        """Start, wait, kill and check; return whether the training was still running."""
        process, _ = self.begin(out)
        try:
            process.wait(after)
            return False
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        process.communicate()
        step = self.check(out, number.name)
        # Of a training that has ended, the signal interrupts no more than Python's exit.
        expected = (0, -signal.SIGTERM) if step == STEPS else (0,)
        if number == signal.SIGTERM and process.returncode not in expected:
            self.problems.append(f"SIGTERM: exit code {process.returncode} at step {step}")
        if number == signal.SIGTERM and step < max(losses(out), default=0):
            self.problems.append(f"SIGTERM: only {step} steps saved")
        return True


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"))


def test_a_killed_training_resumes_as_if_uninterrupted(runs: Runs) -> None:
    rng = random.Random(0)
    terminations = max(1, FAULTS // 5)
    signals = [signal.SIGKILL] * (FAULTS - terminations) + [signal.SIGTERM] * terminations
    rng.shuffle(signals)
    trainings = 0
    while signals:
        out = runs.folder / f"killed-{trainings}"
        trainings += 1
        while signals and runs.kill(out, signals[-1], rng.uniform(0, 0.7) * runs.duration):
            signals.pop()
        assert runs.start(out).wait() == 0
        assert runs.check(out, "the end") == STEPS
        assert losses(out) == runs.expected
    assert runs.problems == []


def test_a_full_disk_loses_nothing(runs: Runs) -> None:
    out, limit = runs.folder / "full", 100_000
    process = runs.start(out)
    while not (out / "latest").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    before = runs.check(out, "before the disk is full")
    process = runs.start(out, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    error = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 2
    assert "could not be written" in error
    assert runs.check(out, "full disk") == before
    assert runs.start(out).wait() == 0
    assert runs.check(out, "the end") == STEPS
    assert runs.problems == []
