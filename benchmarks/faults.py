"""Kill a training again and again, fill its disk, and see whether anything is lost.

    python benchmarks/faults.py

A tiny transformer is trained once in peace. Then the same training is killed at random moments, 20
times by SIGKILL and 5 times by SIGTERM, and started again each time; at last its disk is full, by a
limit on the size of files. After each fault every checkpoint must be readable, and every step that
was ever logged must have the loss that it had in peace, to the last digit; no checkpoint that was
due may be missing, and after SIGTERM not even one step. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from dalle1.model.transformer import Transformer
from dalle1.training.checkpoint import TENSORS_NAME, load_checkpoint
from dvae import DVAE, DVAEConfig

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 240, 5
SIZE = ["--model.width", "64", "--model.depth", "4", "--model.heads", "4"]
RUN = [
    *("--data", "toybox:64", "--device", "cpu", "--num-workers", "1", "--batch-size", "4"),
    *("--log-every", "1", "--save-every", str(SAVE_EVERY), "--validate-every", "35", "--keep", "2"),
    *("--prompts", "a red star", "--accumulate", "2", "--schedule", "plateau"),
    *("--plateau-window", "20", "--vocab-captions", "64"),
]


class Faults:
    """A training's command, what it does in peace, and what has gone wrong so far."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        size = {"image_size": 32, "width": 8, "codebook_size": 16, "code_width": 8}
        DVAE(DVAEConfig(**size)).save(folder / "dvae")
        self.wrong: list[str] = []
        self.checked = 0
        self.safe: dict[Path, int] = {}
        process, began = self.begin(folder / "peace")
        assert process.wait() == 0, "it does not even train in peace"
        self.duration = time.perf_counter() - began
        self.peace = self.losses(folder / "peace")
        assert list(self.peace) == [*range(1, steps + 1)]

    def start(self, out: Path, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        """Begin the training, or go on with it."""
        train = [sys.executable, str(ROOT / "train_transformer.py"), "toy", *SIZE, *RUN]
        where = ["--out", str(out), "--dvae", str(self.folder / "dvae")]
        return subprocess.Popen(
            [*train, *where, "--steps", str(self.steps)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=before,
        )

    def begin(self, out: Path) -> tuple[subprocess.Popen[str], float]:
        """Start the training and wait until it writes its log anew; give that time, too."""
        log = out / "log.jsonl"
        before = log.stat().st_ino if log.exists() else None
        process = self.start(out)
        while process.poll() is None and not (log.exists() and log.stat().st_ino != before):
            time.sleep(0.01)
        return process, time.perf_counter()

    def losses(self, out: Path) -> dict[int, dict[str, float]]:
        """Read what was logged of each step; a line that was cut off has none."""
        found: dict[int, dict[str, float]] = {}
        path = out / "log.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if "total" in values:
                names = ("total", "text", "image", "gradient_norm", "learning_rate")
                found[values["step"]] = {name: values[name] for name in names}
        return found

    def check(self, out: Path, what: str) -> int:
        """Look at all that is there after a fault; give the step that it goes on from.

        That is the last step that was due to be saved, of those that it logged: of the step in the
        middle of whose checkpoint it was killed, the one before.
        """
        for step, values in self.losses(out).items():
            if values != self.peace[step]:
                self.wrong.append(f"{what}: step {step} differs")
        if (out / "latest").is_symlink() and not (out / "latest").exists():
            self.wrong.append(f"{what}: latest points to nothing")
        for folder in [f for f in out.glob("step-*") if f.is_dir()]:
            try:
                self.checked += 1
                Transformer.load(folder)
                Transformer.load(folder / "raw")
                load_file(folder / TENSORS_NAME)
            except Exception as error:
                self.wrong.append(f"{what}: {folder} cannot be read: {error}")
        state = load_checkpoint(out)
        found = state["step"] if state else 0
        logged = max(self.losses(out), default=0)
        if found < (logged - 1) // SAVE_EVERY * SAVE_EVERY or found < self.safe.get(out, 0):
            self.wrong.append(f"{what}: {logged} steps logged, {found} saved")
        self.safe[out] = found
        return found

    def kill(self, out: Path, number: signal.Signals, after: float) -> str | None:
        """Begin, wait, kill; say what came of it, None where the training was over before."""
        process, _ = self.begin(out)
        try:
            process.wait(after)
            return None
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        process.communicate()
        step = self.check(out, number.name)
        if number == signal.SIGTERM and process.returncode != 0:
            self.wrong.append(f"SIGTERM: exit code {process.returncode}")
        if number == signal.SIGTERM and step < max(self.losses(out), default=0):
            self.wrong.append(f"SIGTERM: only {step} steps saved")
        return f"{number.name} after {after:.1f} s, exit {process.returncode}, goes on from {step}"

    def full_disk(self) -> str:
        """Let files grow to 100 kB only; then give room again."""
        out = self.folder / "full"
        process = self.start(out)
        while not (out / "latest").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        before = self.check(out, "full disk, before")
        limit = 100_000
        process = self.start(out, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        said = process.communicate()[1].strip().splitlines()[-1]
        after = self.check(out, "full disk")
        if process.returncode != 2 or "could not be written" not in said or before != after:
            self.wrong.append(f"full disk: exit {process.returncode}, {before} → {after}: {said}")
        assert self.start(out).wait() == 0
        if self.check(out, "full disk, resumed") != self.steps:
            self.wrong.append("full disk: it did not go on")
        return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sigkill", type=int, default=20)
    parser.add_argument("--sigterm", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), options.steps)
        print(f"in peace: {options.steps} steps in {faults.duration:.1f} s", flush=True)
        left = [signal.SIGKILL] * options.sigkill + [signal.SIGTERM] * options.sigterm
        rng.shuffle(left)
        trainings = 0
        while left:
            out = Path(folder) / f"killed-{trainings}"
            trainings += 1
            while left and (
                said := faults.kill(out, left[-1], rng.uniform(0, 0.7) * faults.duration)
            ):
                left.pop()
                print(said, flush=True)
            if faults.start(out).wait() or faults.check(out, "the end") != options.steps:
                faults.wrong.append(f"{out.name} did not come to its end")
            if faults.losses(out) != faults.peace:
                faults.wrong.append(f"{out.name} is not the training in peace")
        print("full disk:", faults.full_disk(), flush=True)
        print(
            f"{trainings} trainings, {faults.checked} checkpoints read, {len(faults.wrong)} faults"
        )
        print("\n".join(faults.wrong))
        raise SystemExit(bool(faults.wrong))


if __name__ == "__main__":
    main()
