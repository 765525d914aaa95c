"""Train a tiny transformer for very many updates; report memory, files and speed over time.

PYTHONPATH=.:tests/support python tests/support/long_run.py OUT --steps 200000 --resumes 20

The training runs in a process with data-loading workers, over as many epochs as its steps have.
Every thousand updates, the memory and the open files of all its processes, the updates per second
of processor time, and the size of the log are noted. Then a shorter training is stopped and resumed
at random points: all its losses must be those of an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments import losses
from launch import ROOT

PAIRS, BATCH = 256, 2
FLAGS = [
    *("--model.width", "16", "--model.depth", "1", "--model.heads", "1", "--model.text-len", "8"),
    *("--model.text-vocab", "260", "--vocab-captions", "64", "--precision", "fp32"),
    *("--batch-size", str(BATCH), "--optimizer", "adamw", "--device", "cpu", "--log-every", "10"),
    *("--validate-every", "1000000", "--prompts", "a red star"),
]


def command(out: Path, run: Path, steps: int, workers: int, save_every: int) -> list[str]:
    """Return the command of a training."""
    words = ["train_transformer.py", "toy", *FLAGS, "--data", str(out / "codes")]
    words += ["--dvae", str(out / "dvae"), "--out", str(run), "--num-workers", str(workers)]
    words += ["--save-every", str(save_every), "--steps", str(steps)]
    return [sys.executable, *words]


def prepare(out: Path) -> None:
    """Write a tiny dVAE, and the codes of some images."""
    from dalle1.data.encoded import main as encode
    from dvae import DVAE, DVAEConfig

    size = DVAEConfig(image_size=32, width=8, codebook_size=16, code_width=8)
    DVAE(size).save(out / "dvae")
    data = ["--data", f"toybox:{PAIRS}", "--dvae", str(out / "dvae"), "--out", str(out / "codes")]
    encode([*data, "--device", "cpu", "--num-workers", "0"])


def processes_of(pid: int) -> list[int]:
    """Return a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def measured(pid: int, run: Path) -> dict[str, Any]:
    """Return what the processes of a training take now."""
    own = processes_of(pid)
    pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in own]
    fields = [Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split() for p in own]
    ticks = sum(int(x[11]) + int(x[12]) for x in fields)
    return {
        "rss_mb": [page * os.sysconf("SC_PAGESIZE") / 1e6 for page in pages],
        "files": sum(len(os.listdir(f"/proc/{p}/fd")) for p in own),
        "cpu": ticks / os.sysconf("SC_CLK_TCK"),
        "log_kb": sum(f.stat().st_size for f in run.glob("*.jsonl")) / 1e3,
    }


def last_step(log: Path) -> int:
    """Return the last step in a log, by its end only."""
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = [x for x in file.read().splitlines() if x.endswith(b"}") and b'"step"' in x[:9]]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def watch(out: Path, words: list[str], minutes: float) -> list[dict[str, Any]]:
    """Run the training, for at most so many minutes; return a row per thousand updates."""
    run, rows = out / "run", []
    with (out / "training.txt").open("a") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        deadline, due = time.monotonic() + 60 * minutes, 1000
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.terminate()
                process.wait(300)
                break
            step = last_step(run / "log.jsonl")
            if step >= due:
                rows.append({"step": step, "time": time.monotonic(), **measured(process.pid, run)})
                due = step // 1000 * 1000 + 1000
                with (out / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            time.sleep(0.2)
    assert process.returncode == 0, (out / "training.txt").read_text()[-2000:]
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Compare the rows of the first tenth, after one to warm up, and of the last tenth."""
    tenth = max(2, len(rows) // 10)
    first, last = rows[1 : 1 + tenth], rows[-tenth:]
    rates = [(b["step"] - a["step"]) / (b["cpu"] - a["cpu"]) for a, b in pairwise(rows[1:])]
    parts = [f"{rows[-1]['step']} updates, {rows[-1]['step'] * BATCH / PAIRS:.0f} epochs"]
    for name, pick in {
        "memory in MB": lambda row: sum(row["rss_mb"]),
        "open files": lambda row: row["files"],
    }.items():
        parts.append(f"{name}: {statistics.mean(map(pick, first)):.1f} at first, "
                     f"{statistics.mean(map(pick, last)):.1f} at last, "
                     f"most {max(map(pick, rows[1:])):.1f}")  # fmt: skip
    parts.append(
        f"updates per second of a processor: {statistics.mean(rates[:tenth]):.1f} at first, "
        f"{statistics.mean(rates[-tenth:]):.1f} at last, {min(rates):.1f} to {max(rates):.1f}"
    )
    parts.append(f"log: {rows[-1]['log_kb'] / rows[-1]['step'] * 1000:.1f} kB per thousand updates")
    return "\n".join(parts)


def resume(out: Path, count: int, workers: int) -> list[str]:
    """Stop and resume a run of 2,000 updates at random points; compare it with a whole one."""
    steps, rng, wrong = 2000, random.Random(0), []
    whole, cut = out / "whole", out / "cut"
    for folder in (whole, cut):
        shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(command(out, whole, steps, workers, steps), cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip
    points = sorted(rng.sample(range(10, steps), count))
    for point in [*points, steps]:
        if last_step(cut / "log.jsonl") >= point:
            continue  # the one before was stopped later than that
        words = command(out, cut, steps, workers, steps)
        with (out / "cut.txt").open("a") as log:
            process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None and last_step(cut / "log.jsonl") < point:
            time.sleep(0.01)
        if point < steps:
            process.terminate()
        if process.wait():
            wrong.append(f"at {point}: exit code {process.returncode}; see {log.name}")
    expected, found = losses(whole), losses(cut)
    wrong += [f"step {x} differs" for x in expected if found.get(x) != expected[x]]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resumes", type=int, default=20)
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    prepare(out)
    if options.steps:
        words = command(out, out / "run", options.steps, options.workers, 5000)
        print(summary(watch(out, words, options.minutes)), flush=True)
    if options.resumes:
        wrong = resume(out, options.resumes, options.workers)
        print(f"{options.resumes} resumes: {wrong[:5] or 'all losses equal'}")
        raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
