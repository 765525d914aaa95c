"""Of two processes one is killed: the other ends in a line, and a restart continues exactly.

`tests/support/many_processes.py` does this and much more with four.
"""

from __future__ import annotations

import os
import subprocess
import sys

import many_processes
import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_a_killed_process_ends_the_other_in_a_line() -> None:
    small = {"PROCESSES": "2", "STEPS": "8"}
    command = [sys.executable, many_processes.__file__, "--kills", "1", "--only", "kill"]
    found = subprocess.run(
        command, env={**os.environ, **small}, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert "kill         good" in found.stdout
