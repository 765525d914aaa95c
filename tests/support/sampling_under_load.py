"""Sample in eight processes at once, short of folders, disk and memory; check all that is written.

PYTHONPATH=.:tests/support python tests/support/sampling_under_load.py [--rounds 3] [--only NAME …]

Each process must end with the images of an undisturbed run, or with one line that begins with
`error:` and exit code 2. Whatever has a final name must be whole: all images of a scores.json, as
in the undisturbed run. Processes are forked from this one, which has imported everything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from experiments import forked
from PIL import Image
from tiny_model import save_whole_model

from dalle1.cli import run

PROCESSES, SECONDS = 8, 300
PROMPTS = ["a red cube", "a blue star", "a red teapot"]
PRELOADED = ["dalle1.commands.sample", "dalle1.pipeline", "dalle1.clip.scoring", "dalle1.outputs"]
CGROUP = Path("/sys/fs/cgroup/memory/dalle1-load")
Hook = Callable[[], None]


class Load:
    """All experiments; each method returns what is wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.note = folder, ""
        self.model, self.count = folder / "model", 0
        save_whole_model(self.model)
        self.reference = folder / "reference"
        assert self.sampled([self.reference]) == []
        self.expected = {prompt: self.images(self.reference, prompt) for prompt in PROMPTS}
        assert all(len(found) == 1 for found in self.expected.values()), self.expected

    def sampled(self, outs: list[Path], hook: Hook | None = None) -> list[str]:
        """Sample into the folders at once; return what is wrong with the ends of processes."""
        self.count += 1
        logs = [self.folder / f"log-{self.count}-{i}.txt" for i in range(len(outs))]
        each = zip(outs, logs, strict=True)
        pids = [forked(partial(self._sample, out, hook), log) for out, log in each]
        wrong, self.endings = [], Counter[str]()
        for pid, log in zip(pids, logs, strict=True):
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            text = log.read_text(errors="replace")
            errors = [line for line in text.splitlines() if line.startswith("error:")]
            if code == -signal.SIGKILL and hook == _join_cgroup:
                self.endings["killed by the system"] += 1
            elif code == 0 and not errors:
                self.endings["good"] += 1
            elif code == 2 and len(errors) == 1 and "Traceback" not in text:
                self.endings[errors[0].replace(str(self.folder), "")[:60]] += 1
            else:
                wrong.append(f"exit code {code}: {text[-900:]!r}")
        return wrong

    def _sample(self, out: Path, hook: Hook | None) -> None:
        signal.alarm(SECONDS)
        if hook:
            hook()
        words = [*PROMPTS, "--model", str(self.model), "--out", str(out), "--device", "cpu"]
        run("sample", [*words, "--num-candidates", "6", "--num-images", "3"])

    def images(self, out: Path, prompt: str) -> dict[Path, list[bytes]]:
        """Return the pixels of the images of a prompt, by folder."""
        found = {}
        for scores in sorted(out.glob("*/scores.json")):
            names = [entry["file"] for entry in json.loads(scores.read_text())]
            images = [Image.open(scores.parent / name) for name in [*names, "grid.png"]]
            if images[0].info["prompt"] == prompt:
                found[scores.parent] = [image.convert("RGB").tobytes() for image in images]
        return found

    def written(self, out: Path) -> tuple[list[str], int]:
        """Return what is wrong with what was written, and the number of whole folders."""
        wrong, whole = [], 0
        for prompt in PROMPTS:
            (pixels,) = self.expected[prompt].values()
            try:
                found = self.images(out, prompt)
            except (OSError, ValueError) as error:
                wrong.append(f"{out}: {error!r}")
                continue
            whole += len(found)
            wrong += [f"{folder} has other images" for folder, x in found.items() if x != pixels]
        complete = {scores.parent for scores in out.glob("*/scores.json")}
        loose = [x for x in out.glob("*/*") if x.parent not in complete and x.name[0] != "."]
        loose = [x for x in loose if not x.parent.name.startswith(".")]
        hidden = list(out.rglob(".*"))
        wrong += [f"{x} is left over" for x in [*loose, *hidden]] if not self.may_leave else []
        return wrong, whole

    may_leave = False
    """Whether processes are killed by the system, which remove nothing."""

    def same(self) -> list[str]:
        """Eight processes, one folder."""
        out = self.folder / f"same-{self.count}"
        wrong = self.sampled([out] * PROCESSES)
        found, whole = self.written(out)
        self.note = f"{dict(self.endings)}, {whole} whole folders"
        return wrong + found

    def different(self) -> list[str]:
        """Eight processes, eight folders."""
        outs = [self.folder / f"different-{self.count}-{i}" for i in range(PROCESSES)]
        wrong, whole = self.sampled(outs), 0
        for out in outs:
            found, count = self.written(out)
            wrong, whole = wrong + found, whole + count
        self.note = f"{dict(self.endings)}, {whole} whole folders"
        if whole != PROCESSES * len(PROMPTS):
            wrong.append(f"{whole} whole folders")
        return wrong

    def disk(self) -> list[str]:
        """Eight processes on a disk that has space for some of their images."""
        out, wrong, whole = self.folder / "small", [], 0
        out.mkdir(exist_ok=True)
        for kilobytes in (16, 64, 200):
            words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(out)]
            if subprocess.run(words, check=False).returncode:
                self.note = "skipped: mount is not permitted"
                return []
            try:
                outs = [out / "one"] * 4 + [out / f"own-{i}" for i in range(4)]
                wrong += self.sampled(outs)
                for folder in sorted({*outs}):
                    found, count = self.written(folder)
                    wrong, whole = wrong + found, whole + count
                self.note += f"{kilobytes} kB: {dict(self.endings)}; "
            finally:
                subprocess.run(["umount", str(out)], check=False)
        self.note += f"{whole} whole folders"
        return wrong

    def memory(self) -> list[str]:
        """Eight processes that may map little more memory than they have."""
        wrong = []
        for megabytes in (8, 16, 24, 32):

            def limit(megabytes: int = megabytes) -> None:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + megabytes * (1 << 20)
                resource.setrlimit(resource.RLIMIT_AS, (most, most))

            out = self.folder / f"memory-{self.count}"
            wrong += self.sampled([out] * PROCESSES, limit) + self.written(out)[0]
            self.note += f"{megabytes} MB: {dict(self.endings)}; "
        return wrong

    def cgroup(self) -> list[str]:
        """Eight processes in a group that may have little memory together."""
        try:
            CGROUP.mkdir(exist_ok=True)
        except OSError:
            self.note = "skipped: cgroups are not permitted"
            return []
        wrong, self.may_leave = [], True
        try:
            for megabytes in (60, 150, 400):
                (CGROUP / "memory.limit_in_bytes").write_text(str(megabytes << 20))
                out = self.folder / f"cgroup-{self.count}"
                wrong += self.sampled([out] * PROCESSES, _join_cgroup) + self.written(out)[0]
                self.note += f"{megabytes} MB: {dict(self.endings)}; "
        finally:
            time.sleep(0.5)
            CGROUP.rmdir()
            self.may_leave = False
        return wrong


def _join_cgroup() -> None:
    (CGROUP / "cgroup.procs").write_text(str(os.getpid()))


def main() -> None:
    names = ["same", "different", "disk", "memory", "cgroup"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for module in PRELOADED:
        importlib.import_module(module)
    failed = False
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        load = Load(Path(folder))
        for name in options.only * options.rounds:
            began, load.note = time.monotonic(), ""
            wrong = getattr(load, name)()
            state = "FAILED" if wrong else "good"
            print(f"{name:10} {state:7} {time.monotonic() - began:4.0f} s  {load.note}", flush=True)
            for problem in wrong[:8]:
                print(f"    {problem}", flush=True)
            failed |= bool(wrong)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
