"""Fuzz all targets in turn; print the number of inputs and the failures.

python -m fuzz --minutes 10 --seed 0 --targets images shards
python -m fuzz --rounds 2 --seed 0

With `--rounds`, the same seed runs the same inputs on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz import datasets, media, models, text
from fuzz.harness import Runner, limit_memory
from fuzz.world import World

Target = Callable[[text.Choose, World, Path], list[str]]

TARGETS: dict[str, Target] = {
    "prompts": text.prompts,
    "flags": text.flags,
    "images": media.images,
    "masks": media.masks,
    "captions": datasets.captions,
    "shards": datasets.shards,
    "codes": datasets.codes,
    "models": models.models,
    "checkpoints": models.checkpoints,
    "archives": models.archives,
    "foreign": models.foreign,
}
PER_ROUND = 10


class Fuzzer:
    """Generates inputs, runs them, and collects what failed."""

    def __init__(self, root: Path, keep: Path | None = None) -> None:
        """Use the folder `root` for inputs; copy those of failures to `keep`."""
        self.runner, self.keep = Runner(root), keep
        self.world = World(self.runner.root)
        self.inputs: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.endings: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.failures: defaultdict[str, list[str]] = defaultdict(list)

    def one(self, name: str, choose: text.Choose, *, is_known: bool = False) -> None:
        """Run one input of a target; where it is known from earlier, only make it."""
        began = time.process_time()
        self.runner.clear()
        words = TARGETS[name](choose, self.world, self.runner.scratch)
        if is_known:
            return
        has_pipe = any(word.startswith("pipe:") for word in words)
        wrong, last = self.runner.check(words, may_start_programs=has_pipe)
        self.inputs[name] += 1
        self.seconds[name] += time.process_time() - began
        self.endings[name]["success" if last == "success" else "error"] += 1
        if wrong:
            self.failures[f"{name}: {wrong}"].append(" ".join(words))
            if self.keep and len(self.failures[f"{name}: {wrong}"]) == 1:
                to = self.keep / f"{len(self.failures)}"
                shutil.rmtree(to, ignore_errors=True)
                with contextlib.suppress(shutil.Error):  # pipes cannot be copied
                    shutil.copytree(self.runner.scratch / "in", to / "in", symlinks=True)
                to.mkdir(parents=True, exist_ok=True)
                (to / "what.txt").write_text(f"{words!r}\n{wrong}\n", errors="backslashreplace")

    def round(self, name: str, number: int, count: int) -> None:
        """Run `count` inputs of a target of seed `number`.

        Hypothesis begins each round with the same, simplest input. Only the round of one runs it.
        """
        is_known = count > 1

        @seed(number)
        @settings(
            max_examples=count + is_known,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[*HealthCheck],
        )
        @given(st.data())
        def test(data: st.DataObject) -> None:
            nonlocal is_known
            known, is_known = is_known, False
            self.one(name, data.draw, is_known=known)

        test()

    def report(self) -> str:
        """Return a table of the targets, and each failure once."""
        lines = [f"{'target':12} {'inputs':>7} {'success':>8} {'one line':>8} {'CPU ms':>8}"]
        for name, count in self.inputs.items():
            ends = self.endings[name]
            each = 1000 * self.seconds[name] / count
            lines.append(f"{name:12} {count:7} {ends['success']:8} {ends['error']:8} {each:8.0f}")
        lines.append(f"{'all':12} {self.inputs.total():7}")
        for wrong, found in self.failures.items():
            lines += [f"FAILURE ({len(found)} times) {wrong}", f"  dalle1 {found[0][:600]}"]
        return "\n".join(lines)


def fuzz(
    targets: Sequence[str],
    root: Path,
    *,
    first: int,
    minutes: float = math.inf,
    rounds: float = math.inf,
    per_round: int = PER_ROUND,
    keep: Path | None = None,
) -> Fuzzer:
    """Run the simplest input of each target, then rounds of `per_round`, until the time is up."""
    fuzzer = Fuzzer(root, keep)
    begin, number = os.getcwd(), first
    try:
        if "foreign" in targets and not fuzzer.world.foreign:
            targets = [name for name in targets if name != "foreign"]
        for name in targets:
            fuzzer.round(name, number, 1)
        deadline = time.monotonic() + 60 * minutes
        while time.monotonic() < deadline and number - first < rounds:
            number += 1
            for name in targets:
                if time.monotonic() < deadline:
                    fuzzer.round(name, number, per_round)
    finally:
        os.chdir(begin)
    return fuzzer


def main() -> None:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--rounds", type=float, default=math.inf, help="of 10 inputs a target")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], choices=[*TARGETS])
    parser.add_argument("--keep", type=Path, help="folder for the inputs of failures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    limit_memory()
    sys.dont_write_bytecode = True  # a module that is imported late writes no cache
    warnings.filterwarnings("ignore", module=r"PIL\.")
    first = int(time.time()) if options.seed is None else options.seed
    print(f"seed {first}", flush=True)
    keep = options.keep and options.keep.absolute()
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as root,
        contextlib.suppress(KeyboardInterrupt),
    ):
        fuzzer = fuzz(
            options.targets,
            Path(root),
            first=1_000_000 * first,
            minutes=options.minutes,
            rounds=options.rounds,
            keep=keep,
        )
        print(fuzzer.report())
        if fuzzer.failures:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
