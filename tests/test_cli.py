"""The installed command: fast help, errors of one line, and a wheel that is complete."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dalle1 import cli
from dalle1.clip.reranking import RankOptions
from dalle1.console import RENAMED_FLAGS, command_line, expand_home, one_line_errors, parse
from dalle1.data.spec import split_names

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
    assert "  encode " not in text


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
        (["train", "dvae", "toy", "--stps", "3"], "--stps is unknown, expected --steps; see"),
        (["train", "dvae", "toy", "--allow-upscle"], "is unknown, expected --allow-upscale;"),
        (["train", "dvae", "toy", "--steps", "many"], "--steps is 'many', expected INT;"),
        (
            ["train", "dvae", "toy", "--schedule-steps", "many"],
            "--schedule-steps is 'many', expected ",
        ),
        (["train", "dvae", "toy", "--ema-decay", "x"], "--ema-decay is 'x', expected FLOAT;"),
        (
            ["train", "dvae", "toy", "--precision", "x"],
            "--precision is 'x', expected auto or bf16",
        ),
        (["train", "dvae", "toy", "--out"], "--out has no value, expected PATH; see"),
        (["train", "dvae", "toy", "x"], "'x' is unknown; see dalle1 train dvae --help"),
        (["train", "dvae", "toy", "--model.width", "3"], "--model.width is 3, expected a multiple"),
        (["train", "dvae", "toy", "--batch_size=0"], "--batch-size is 0, expected at least 1"),
        (["encode"], "--out PATH and --dvae PATH are missing; see dalle1 encode --help"),
        (["encode", "--dva", "x"], "--dvae PATH are missing, and --dva is unknown; see"),
        (["rank"], "PROMPT is missing; see"),
        (["import", "openai-dvae", "--out", "x"], "ENCODER and DECODER are missing; see"),
        (["import", "openai-dvae", "a", "b", "--out", "x"], "a: no such file or directory;"),
        (
            ["evaluate"],
            "the first argument is missing, expected one of: toybox,",
        ),
        (["evaluate", "dVAE"], "the first argument is 'dVAE', expected one of: toybox,"),
        (
            ["evaluate", "--out", "x", "clip"],
            "the first argument is '--out', expected one of:",
        ),
        (["evaluate", "toybox", "--best-of", "x"], "--best-of is 'x', expected [INT [INT ...]];"),
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
    assert not Path("x").exists()


def test_flags_of_earlier_versions_and_launchers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--local_rank=3", "--local-rank=3", "a", "--pictures=2", "--crops_per_picture", "4"]
    assert command_line(words) == ["a", "--images=2", "--crops-per-image", "4"]
    prompts = ["~", "~/a", "a cat,~", "--prompt=~/a"]
    assert command_line(prompts) == prompts
    words = ["a cat,~", "~/a.png", "x/~/a", "--out=~/out", "--clip", "~/clip"]
    options = parse(RankOptions, words, "")
    assert (options.prompt, options.clip) == ("a cat,~", "/home/me/clip")
    assert options.files == (Path("/home/me/a.png"), Path("x/~/a"))
    assert options.out == Path("/home/me/out")
    assert parse(RankOptions, ["~", "a"], "").prompt == "~"
    assert split_names("~/a::2,~/b::1") == (["/home/me/a", "/home/me/b"], [2.0, 1.0])


def test_an_unknown_home_folder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ValueError, match=r"~/a is in the home folder, which is unknown; set HOME"):
        expand_home("~/a")


def test_help_shows_the_names_of_today(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "dvae", "--help"])
    assert not [flag for flag in RENAMED_FLAGS if f"{flag} " in capsys.readouterr().out]


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_signal_after_the_work_is_done_changes_nothing() -> None:
    program = (
        "import atexit, os, signal, sys, types\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)  # the last to run\n"
        "from dalle1 import cli\n"
        "sys.modules['done'] = types.SimpleNamespace(main=lambda args: None)\n"
        "cli.SUBCOMMANDS['done'] = ('done', '')\n"
        "cli.main(['done'])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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
    for folder in ("dalle1", "dalle2", "dvae"):
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
    subprocess.run(command, cwd=empty, env=environment, check=True, timeout=1200)
    image = Image.open(empty / "outputs" / "an-avocado-armchair" / "00.png")
    assert image.size == (256, 256)


def test_warnings_of_libraries_are_notes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(args: object) -> None:
        warnings.warn_explicit("slow\n  data loader", UserWarning, "torch/utils/x.py", 3)

    monkeypatch.setattr(cli, "prepare_process", lambda **_: None)
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=main))
    shown = warnings.showwarning
    cli.run("train dvae", [])
    assert warnings.showwarning is shown
    assert capsys.readouterr().err == "note: slow data loader\n"


def test_memory_is_kept_where_it_is_needed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, bool] = {}
    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(main=lambda _: None))
    for name in ("train dvae", "sample", "import rudalle"):
        monkeypatch.setattr(
            cli, "prepare_process", lambda keep_memory, name=name: kept.update({name: keep_memory})
        )
        cli.run(name, [])
    assert kept == {"train dvae": True, "sample": False, "import rudalle": False}
