"""Start a command in two processes that find each other, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def in_two_processes(*arguments: object, timeout: float = 200) -> list[str]:
    """Run Python on CPU in two processes, and give what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
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
    assert codes == [0, 0], "".join(text[-5000:] for text in printed)
    return printed
