"""Processes that train one transformer together, and mounts and hosts of their own for them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from experiments import forked, losses
from launch import free_port

from dalle1.cli import run

WORLD, STEPS = int(os.environ.get("PROCESSES", 4)), int(os.environ.get("STEPS", 24))
SAVE_EVERY = 5
FLAGS = [
    *("--model.width", "16", "--model.depth", "2", "--model.heads", "2", "--precision", "fp32"),
    *("--data", "toybox:64", "--device", "cpu", "--num-workers", "0", "--batch-size", "8"),
    *("--log-every", "1", "--save-every", str(SAVE_EVERY), "--validate-every", "16", "--keep", "2"),
    *("--prompts", "a red star", "--vocab-captions", "64", "--optimizer", "adamw"),
]

Hook = Callable[[], None]


class Job:
    """Processes that train together."""

    def __init__(
        self,
        folder: Path,
        out: Path,
        *,
        world: int = WORLD,
        hooks: Mapping[int, Hook] | None = None,
        flags: Sequence[str] = (),
        steps: int = STEPS,
        address: str = "127.0.0.1",
        port: int | None = None,
    ) -> None:
        """Start them.

        Args:
            hooks: rank → what its process calls first.
        """
        self.out, self.logs = out, []
        self.ends: dict[int, tuple[int, float]] = {}
        words = ["toy", *FLAGS, "--dvae", str(folder / "dvae"), "--out", str(out)]
        words += ["--steps", str(steps), *flags]
        port = free_port() if port is None else port
        meet = {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": world}
        self.pids = []
        for rank in range(world):
            self.logs.append(Path(tempfile.mkstemp(dir=folder, suffix=f"-{rank}.txt")[1]))
            env = {k: str(v) for k, v in {**meet, "RANK": rank, "LOCAL_RANK": rank}.items()}
            hook = (hooks or {}).get(rank)
            self.pids.append(forked(partial(_train, words, env, hook), self.logs[-1]))

    def poll(self) -> bool:
        """Note which processes ended; return whether all did."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.ends:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.ends[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        return len(self.ends) == len(self.pids)

    def wait(self, seconds: float = 600) -> dict[int, tuple[int, float]]:
        """Wait until all end, or for so long; kill the others; return exit codes and times."""
        deadline = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < deadline:
            time.sleep(0.02)
        for rank, pid in enumerate(self.pids):
            if rank not in self.ends:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.ends[rank] = -99, time.monotonic()
        return self.ends

    def until_step(self, step: int) -> None:
        """Wait until a step is logged, or all processes ended."""
        while not self.poll() and max(losses(self.out), default=0) < step:
            time.sleep(0.01)

    def errors(self, rank: int) -> list[str]:
        return [x for x in self.logs[rank].read_text().splitlines() if x.startswith("error:")]

    def problems_after(self, began: float, lost: Sequence[int], seconds: float) -> list[str]:
        """Return what is wrong with the ends of all processes but those that were broken."""
        found = []
        for rank, (code, when) in sorted(self.wait(seconds).items()):
            text, errors = self.logs[rank].read_text(), self.errors(rank)
            if rank in lost:
                continue
            if code == -99:
                found.append(f"rank {rank} still ran after {seconds:.0f} s")
            elif code != 2 or len(errors) != 1 or "Traceback" in text:
                found.append(f"rank {rank}: exit code {code}, {text[-600:]!r}")
            self.slowest = max(getattr(self, "slowest", 0.0), when - began)
        return found


def _train(words: Sequence[str], env: Mapping[str, str], hook: Hook | None) -> None:
    os.environ.update(env)
    if hook:
        hook()
    run("train transformer", [*words])


def mount_over(folder: Path, target: Path) -> None:
    """Let this process alone see `folder` as `target`."""
    libc = ctypes.CDLL(None, use_errno=True)
    private, bind = (1 << 18) | (1 << 14), 1 << 12
    for wrong in (
        libc.unshare(0x20000),
        libc.mount(b"none", b"/", None, private, None),
        libc.mount(bytes(folder), bytes(target), None, bind, None),
    ):
        if wrong:
            raise OSError(ctypes.get_errno(), "mount is not permitted")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def connect(first: str, second: str) -> None:
    """Connect two network namespaces, of which the first exists, by a cable."""
    ip("netns", "add", second)
    ip("link", "add", "cable0", "netns", first, "type", "veth", "peer", "cable1", "netns", second)
    for number, host in enumerate((first, second)):
        ip("-n", host, "address", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
        for device in ("lo", f"cable{number}"):
            ip("-n", host, "link", "set", device, "up")


def on_host(host: str) -> Hook:
    def enter() -> None:
        with open(f"/run/netns/{host}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns is not permitted")
        os.environ["GLOO_SOCKET_IFNAME"] = "cable0" if host.endswith("a") else "cable1"

    return enter
