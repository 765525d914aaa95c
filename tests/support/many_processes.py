"""Break one of four processes that train one model, in many ways; report how all of them end.

PYTHONPATH=.:tests/support python tests/support/many_processes.py [--only NAME …] [--kills 10]

A tiny transformer is trained on gloo without interruption. In each experiment one process is then
killed, suspended, slowed down, deprived of its disk, or sees files or the clock late. All others
must end within a minute (within three where nothing closes their connections), with one line that
begins with `error:`. The same command must then resume, and every logged step must have the values
of the uninterrupted training. Processes are forked from this one, which has imported everything.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from experiments import losses
from launch import ROOT, free_port
from training_job import FLAGS, STEPS, WORLD, Hook, Job, connect, ip, mount_over, on_host

from dalle1.training import distributed
from dvae import DVAE, DVAEConfig

PRELOADED = ["dalle1.tasks.transformer", "torch._dynamo", "torch._inductor", "torch.distributed.nn"]
CLOSED, SILENT = 60, 180
"""Seconds in which all end after a connection was closed, and after one that only fell silent."""


class Experiments:
    """All experiments; each method returns what is wrong, and notes what it measured."""

    def __init__(self, folder: Path, kills: int) -> None:
        self.folder, self.kills, self.rng = folder, kills, random.Random(0)
        self.note = ""
        DVAE(DVAEConfig(image_size=32, width=8, codebook_size=16, code_width=8)).save(
            folder / "dvae"
        )
        began = time.monotonic()
        job = Job(folder, folder / "whole")
        codes = [code for code, _ in job.wait().values()]
        assert codes == [0] * WORLD, "".join(log.read_text()[-2000:] for log in job.logs)
        self.expected = losses(job.out)
        assert list(self.expected) == [*range(1, STEPS + 1)]
        print(f"uninterrupted: {time.monotonic() - began:.0f} s", flush=True)

    def start(self, name: str, **how: object) -> Job:
        return Job(self.folder, self.folder / name, **how)  # type: ignore[arg-type]

    def resumed(self, out: Path, rel: float = 0, **how: object) -> list[str]:
        """Resume a training to its end; return what differs from the uninterrupted one."""
        job = Job(self.folder, out, **how)  # type: ignore[arg-type]
        codes = [code for code, _ in job.wait().values()]
        if any(codes):
            return [f"resumed: exit codes {codes}: {job.logs[0].read_text()[-600:]!r}"]
        return self.differences(out, rel)

    def differences(self, out: Path, rel: float = 0) -> list[str]:
        found = losses(out)
        if list(found) != list(self.expected):
            return [f"steps {list(found)} are logged"]
        return [
            f"step {step} differs: {values} {self.expected[step]}"
            for step, values in found.items()
            for name, value in values.items()
            if abs(value - self.expected[step][name]) > rel * abs(value)
        ][:2]

    def kill(self) -> list[str]:
        """Kill one process at a random moment; resume."""
        wrong, slowest = [], 0.0
        for number in range(self.kills):
            rank, step = number % WORLD, self.rng.randrange(STEPS - 3)
            job = self.start(f"kill-{number}")
            job.until_step(step)
            time.sleep(self.rng.random() * 0.2)
            began = time.monotonic()
            os.kill(job.pids[rank], signal.SIGKILL)
            found = job.problems_after(began, [rank], CLOSED)
            slowest = max(slowest, job.slowest)
            found += self.resumed(job.out)
            wrong += [f"rank {rank} killed after step {step}: {x}" for x in found]
        self.note = f"{self.kills} kills; the others ended after at most {slowest:.1f} s"
        return wrong

    def terminate(self) -> list[str]:
        """Send SIGTERM to one process: all save and stop; resume."""
        job = self.start("terminate")
        job.until_step(7)
        os.kill(job.pids[2], signal.SIGTERM)
        codes = [code for code, _ in job.wait(CLOSED).values()]
        saved = max(losses(job.out), default=0)
        self.note = f"stopped after step {saved}"
        wrong = [] if not any(codes) and saved < STEPS else [f"exit codes {codes}"]
        return wrong + self.resumed(job.out)

    def suspend(self) -> list[str]:
        """Suspend one process for good: nothing closes its connections."""
        wrong, slowest = [], 0.0
        for rank in (0, 3):
            job = self.start(f"suspend-{rank}")
            job.until_step(7)
            began = time.monotonic()
            os.kill(job.pids[rank], signal.SIGSTOP)
            wrong += job.problems_after(began, [rank], SILENT)
            slowest = max(slowest, job.slowest)
            wrong += self.resumed(job.out)
        self.note = f"ranks 0 and 3; the others ended after at most {slowest:.0f} s"
        return wrong

    def slow(self) -> list[str]:
        """Suspend one process for 20 s: nothing but time is lost."""
        job = self.start("slow")
        job.until_step(7)
        os.kill(job.pids[1], signal.SIGSTOP)
        time.sleep(20)
        os.kill(job.pids[1], signal.SIGCONT)
        codes = [code for code, _ in job.wait().values()]
        return [f"exit codes {codes}"] if any(codes) else self.differences(job.out)

    def full_disk(self) -> list[str]:
        """Let the files of one process be small: the checkpoint of rank 0, a report of rank 2."""

        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))

        job = self.start("full", hooks={0: limited})
        wrong = job.problems_after(time.monotonic(), [], CLOSED + 60)
        if not any("could not be written" in x for x in job.errors(0)):
            wrong.append(f"rank 0 reports {job.errors(0)}")
        self.note = (job.errors(0) or [""])[0].replace(str(self.folder), "")[:70]
        return wrong + self.resumed(job.out)

    def full_tmpfs(self) -> list[str]:
        """Train into a file system that the second checkpoint fills."""
        out = self.folder / "tmpfs"
        out.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "none", str(out)])
        if made.returncode:
            self.note = "skipped: mount is not permitted"
            return []
        try:
            job = Job(self.folder, out / "run")
            wrong = job.problems_after(time.monotonic(), [], CLOSED + 60)
            if not any("No space left" in x for x in job.errors(0)):
                wrong.append(f"rank 0 reports {job.errors(0)}")
            self.note = (job.errors(0) or [""])[0].replace(str(out), "")[:70]
            subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
            return wrong + self.resumed(out / "run")
        finally:
            subprocess.run(["umount", str(out)], check=False)

    def port(self) -> list[str]:
        """Let another program, then another training, have the port."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            hooks = dict.fromkeys(range(WORLD), _join_quickly)
            job = self.start("port", port=server.getsockname()[1], hooks=hooks)
            wrong = job.problems_after(time.monotonic(), [], CLOSED)
        self.note = (job.errors(0) or [""])[0][:80]
        port = free_port()
        first = self.start("port-first", port=port)
        first.until_step(2)
        second = self.start("port-second", port=port)
        wrong += second.problems_after(time.monotonic(), [], CLOSED)
        codes = [code for code, _ in first.wait().values()]
        wrong += [f"the first training: exit codes {codes}"] if any(codes) else []
        return wrong + self.differences(first.out)

    def lag(self) -> list[str]:
        """Let the other processes see the files of rank 0 seconds later."""
        out, late, wrong = self.folder / "lag", self.folder / "late", []
        for folder in (out, late):
            folder.mkdir()
        hooks = dict.fromkeys(range(1, WORLD), lambda: mount_over(late, out))
        job = Job(self.folder, out, hooks=hooks)
        job.until_step(12)
        os.kill(job.pids[1], signal.SIGKILL)
        wrong += job.problems_after(time.monotonic(), [1], CLOSED)
        job = Job(self.folder, out, hooks=hooks)
        time.sleep(15)
        shutil.copytree(out, late, symlinks=True, dirs_exist_ok=True)
        codes = [code for code, _ in job.wait().values()]
        wrong += [f"exit codes {codes}: {job.logs[1].read_text()[-600:]}"] if any(codes) else []
        self.note = "files appeared 15 s late"
        return wrong + self.differences(out)

    def clock(self) -> list[str]:
        """Let the clock of one process be a day behind, that of another one ahead."""

        def shifted(days: int) -> Hook:
            def shift() -> None:
                now = time.time
                time.time = lambda: now() + 86400 * days  # type: ignore[method-assign]

            return shift

        out = self.folder / "clock"
        hooks = {0: shifted(-1), 2: shifted(1)}
        job = Job(self.folder, out, hooks=hooks)
        job.until_step(12)
        os.kill(job.pids[3], signal.SIGKILL)
        wrong = job.problems_after(time.monotonic(), [3], CLOSED)
        return wrong + self.resumed(out, hooks={0: shifted(2), 1: shifted(-2)})

    def latest(self) -> list[str]:
        """Let `latest` lead nowhere, and to a file, when the training resumes."""
        job = self.start("latest")
        job.until_step(12)
        os.kill(job.pids[2], signal.SIGKILL)
        wrong = job.problems_after(time.monotonic(), [2], CLOSED)
        latest = job.out / "latest"
        latest.unlink()
        latest.symlink_to("step-999")
        return wrong + self.resumed(job.out)

    def zero1(self) -> list[str]:
        return self._zero(1)

    def zero2(self) -> list[str]:
        return self._zero(2)

    def zero3(self) -> list[str]:
        return self._zero(3)

    def _zero(self, stage: int) -> list[str]:
        """Resume ZeRO with 2 processes after 4, and with 4 after 2."""
        wrong = []
        for before, after in ((4, 2), (2, 4)):
            out = self.folder / f"zero{stage}-{before}"
            flags = ["--zero", str(stage)]
            job = Job(self.folder, out, world=before, flags=flags)
            job.until_step(12)
            os.kill(job.pids[1], signal.SIGKILL)
            found = job.problems_after(time.monotonic(), [1], CLOSED)
            found += self.resumed(out, 1e-3, world=after, flags=flags)
            wrong += [f"ZeRO {stage}, {before} → {after}: {x}" for x in found]
        return wrong

    def elastic(self) -> list[str]:
        """Kill one process of torchrun, which restarts all."""
        out = self.folder / "elastic"
        words = ["toy", *FLAGS, "--dvae", self.folder / "dvae", "--out", out, "--steps", STEPS]
        launcher = ["torch.distributed.run", "--nproc-per-node", WORLD, "--max-restarts", "2"]
        launcher += ["--master-port", free_port()]
        command = [sys.executable, "-m", *launcher, "train_transformer.py", *words]
        log = (self.folder / "elastic.txt").open("w+")
        agent = subprocess.Popen([str(x) for x in command], cwd=ROOT, stdout=log, stderr=log)
        while agent.poll() is None and max(losses(out), default=0) < 12:
            time.sleep(0.05)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        workers = [p for p in children if b"train_transformer" in _command(int(p))]
        os.kill(int(workers[2]), signal.SIGKILL)
        code = agent.wait(600)
        text = Path(log.name).read_text()
        self.note = f"{text.count('Resuming at step')} restart"
        wrong = [] if code == 0 else [f"exit code {code}: {text[-1500:]}"]
        return wrong + self.differences(out)

    def cable(self) -> list[str]:
        """Train on two hosts, network namespaces with two processes each; pull the cable."""
        hosts = ("dalle1-a", "dalle1-b")
        if subprocess.run(["ip", "netns", "add", hosts[0]], check=False).returncode:
            self.note = "skipped: network namespaces are not permitted"
            return []
        try:
            connect(*hosts)
            hooks = {rank: on_host(hosts[rank // 2]) for rank in range(WORLD)}
            job = self.start("cable", hooks=hooks, address="10.77.0.1", port=29500)
            job.until_step(12)
            began = time.monotonic()
            ip("-n", hosts[1], "link", "set", "cable1", "down")
            wrong = job.problems_after(began, [], SILENT)
            self.note = f"all ended {job.slowest:.0f} s later"
            ip("-n", hosts[1], "link", "set", "cable1", "up")
            return wrong + self.resumed(job.out, hooks=hooks, address="10.77.0.1", port=29500)
        finally:
            for host in hosts:
                subprocess.run(["ip", "netns", "del", host], check=False)


def _join_quickly() -> None:
    distributed.JOIN_TIMEOUT = timedelta(seconds=15)


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def main() -> None:
    names = [
        n for n in vars(Experiments) if n not in ("start", "resumed", "differences") and n[0] != "_"
    ]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for module in PRELOADED + (
        ["deepspeed"] if {"zero1", "zero2", "zero3"} & {*options.only} else []
    ):
        importlib.import_module(module)
    failed = False
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        experiments = Experiments(Path(folder), options.kills)
        for name in options.only:
            began, experiments.note = time.monotonic(), ""
            wrong = getattr(experiments, name)()
            took = time.monotonic() - began
            print(
                f"{name:12} {'FAILED' if wrong else 'good':7} {took:5.0f} s  {experiments.note}",
                flush=True,
            )
            for problem in wrong:
                print(f"    {problem}", flush=True)
            failed |= bool(wrong)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
