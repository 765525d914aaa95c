"""`dalle1 web` without Gradio, its options, and the container that runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dalle1.commands import web

ROOT = Path(__file__).resolve().parents[2]


def test_without_gradio_it_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        web.main([])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "pip install 'dalle1[web]'" in lines[0]


def test_bad_ports_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        web.main(["--port", "70000"])
    assert stop.value.code == 2
    assert "70000, expected 1 to 65535" in capsys.readouterr().err


def test_the_container_runs_this_command(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    steps = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    program, subcommand, *args = json.loads(steps["CMD"])
    assert (program, subcommand) == ("dalle1", "web")
    parsed: dict[str, Any] = {}
    monkeypatch.setattr(web, "find_spec", lambda name: None)  # it ends once options are parsed
    parse = web.parse
    monkeypatch.setattr(web, "parse", lambda *a, **k: parsed.setdefault("config", parse(*a, **k)))
    with pytest.raises(SystemExit):
        web.main(args)
    assert parsed["config"].host == "0.0.0.0"
    assert str(parsed["config"].port) == steps["EXPOSE"]
    assert steps["ENV"] == "HF_HUB_OFFLINE=1"
    # Each option of the installation names what is there.
    extra = re.search(r'^RUN pip install .*"\.\[(\w+)\]"', "\n".join(lines), re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert extra
    assert re.search(rf"^{extra[1]} = ", project, re.MULTILINE)
    assert (ROOT / "constraints.txt").is_file()
