"""Start a command in several processes that find each other, as torchrun does."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port below those that the system hands out, so that no connection takes it meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                return port


def in_two_processes(*arguments: object) -> list[str]:
    """Run Python on CPU in two processes, and return what each of them printed."""
    return in_processes(2, *arguments)


def in_processes(count: int, *arguments: object, timeout: float = 1200) -> list[str]:
    """Run Python on CPU in `count` processes, and return what each of them printed."""
    port = str(free_port())
    path = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        started = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, **path, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for rank, file in enumerate(files)
        ]
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        printed = [file.seek(0) or file.read() for file in files]
    assert not any(codes), "".join(text[-5000:] for text in printed)
    return printed
