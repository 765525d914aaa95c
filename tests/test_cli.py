"""The installed command: fast help, errors of one line, and a wheel that is complete."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from dalle1 import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_subcommand(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [name for name in cli.SUBCOMMANDS if not any(f"  {name} " in s for s in lines)] == []


def test_help_of_a_group_lists_its_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "usage: dalle1 train SUBCOMMAND" in text
    assert "train clip" in text
    assert "encode" not in text


def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom dalle1 import cli\ncli.main(['--help'])\n"
        "assert not {'torch', 'transformers', 'PIL', 'tyro', 'numpy'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["paint"], "the subcommand is 'paint', expected one of: sample, train dvae,"),
        (["train", "vae"], "the subcommand is 'train vae', expected one of: train dvae,"),
        (["sample", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["train", "dvae", "huge"], "'huge'"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["dalle1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_subcommand_is_a_function_with_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(import_module(cli.SUBCOMMANDS[name][0]).main)
    monkeypatch.setattr(sys, "argv", ["dalle1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(), "--help"])
    assert stopped.value.code == 0
    assert f"usage: dalle1 {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "script", ["sample", "evaluate", "train_dvae", "train_transformer", "train_clip"]
)
def test_scripts_run_the_functions_of_the_command(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cli, "run", calls.append)
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert calls == [script.replace("_", " ")]
    assert calls[0] in cli.SUBCOMMANDS


@pytest.mark.slow
def test_a_wheel_samples_from_any_folder(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel offline")
    source, target, empty = tmp_path / "source", tmp_path / "installed", tmp_path / "empty"
    for folder in ("dalle1", "dvae"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.pyc"))
    for file in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, source)
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-cache-dir"]
    install = ["install", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *install, "--target", str(target), str(source)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where = [sys.executable, "-c", "import dalle1, dvae; print(dalle1.__file__, dvae.__file__)"]
    found = subprocess.check_output(where, cwd=empty, env=environment, text=True)
    assert found.count(str(target)) == 2
    flags = ["--num-candidates", "1", "--num-images", "1", "--device", "cpu", "--precision", "fp32"]
    command = [str(target / "bin" / "dalle1"), "sample", "an avocado armchair", *flags]
    subprocess.run(command, cwd=empty, env=environment, check=True, timeout=300)
    image = Image.open(empty / "outputs" / "an-avocado-armchair" / "00.png")
    assert image.size == (256, 256)
