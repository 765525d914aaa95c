"""What a command prints: no message that cannot be shown ends its work."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dalle1.cli import main
from dalle1.console import bar, let_no_print_fail, one_line_errors, parse
from dalle1.pipeline import BUNDLED

ROOT = Path(__file__).resolve().parent.parent


def stream_to(handle: int, **how: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(handle, "wb", closefd=False), **how)


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("cp1252", "caf\u00e9 \u732b", b"caf\xe9 \\u732b"),
        ("ascii", "caf\u00e9", b"caf\\xe9"),
        ("utf-8", "caf\udce9 \u732b", b"caf\\udce9 \xe7\x8c\xab"),
    ],
)
@pytest.mark.parametrize("buffered", [True, False])
def test_letters_that_a_console_lacks_are_escaped(
    encoding: str, text: str, shown: bytes, buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    raw = io.FileIO(write, "wb", closefd=False)
    stream = io.TextIOWrapper(io.BufferedWriter(raw) if buffered else raw, encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    let_no_print_fail()
    let_no_print_fail()
    print(text, flush=True)
    assert os.read(read, 99) == shown + os.linesep.encode()
    for handle in (read, write):
        os.close(handle)


def test_a_handler_of_errors_that_was_chosen_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", "replace")
    monkeypatch.setattr(sys, "stdout", stream)
    let_no_print_fail()
    assert sys.stdout is stream  # no file: left where it is
    assert stream.errors == "replace"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    let_no_print_fail()
    assert sys.stdout.errors == "backslashreplace"


def test_a_closed_pipe_and_a_full_disk_end_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    handles = [write]
    if Path("/dev/full").exists():
        handles.append(os.open("/dev/full", os.O_WRONLY))
    for handle in handles:
        monkeypatch.setattr(sys, "stderr", stream_to(handle))
        let_no_print_fail()
        for _ in range(3):
            print("a message", file=sys.stderr, flush=True)
        os.close(handle)


def test_a_full_pipe_that_does_not_block_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    reader = subprocess.Popen(["wc", "-c"], stdin=read, stdout=subprocess.PIPE)
    os.close(read)
    monkeypatch.setattr(sys, "stdout", stream_to(write))
    let_no_print_fail()
    print("x" * 2**20, flush=True)
    os.close(write)
    assert int(reader.communicate(timeout=600)[0]) == 2**20 + 1


def test_a_stream_that_is_closed_takes_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    let_no_print_fail()
    assert sys.stdout is not None
    sys.stdout.write("a message")
    sys.stdout.close()


def test_a_check_names_files_that_a_console_cannot_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    Image.effect_noise((16, 16), 60).save(data / "0.png")
    (data / "0.txt").write_text("a caption")
    odd = os.fsdecode(os.fsencode(data) + b"/caf\xe9.png")
    try:
        Image.new("RGB", (16, 16)).save(odd)
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    words = ["--vocab", str(BUNDLED / "vocab.json"), "--num-workers", "0", "--out", str(out)]
    main(["check", str(data), *words, "--max-bad-fraction", "1"])
    skipped = (out / "skipped.jsonl").read_text(encoding="utf-8")
    assert json.loads(skipped)["where"] == odd
    assert "caf\\udce9.png" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["sample", "--help"], ["paint\udce9"]])
def test_help_and_errors_are_shown_on_any_console(words: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "dalle1", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == (2 if words[0].startswith("paint") else 0)
    assert "Traceback" not in done.stderr
    assert done.stdout if done.returncode == 0 else "'paint\\udce9'" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("could not create a primitive"),
    ],
)
def test_exhausted_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory; end other programs, or use a smaller model")


@dataclass(frozen=True)
class WithBatches:
    batch_size: int = 1


@dataclass(frozen=True)
class WithoutBatches:
    seed: int = 0


def test_exhausted_memory_names_a_flag_that_the_command_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(command: str) -> None:
        with one_line_errors():
            parse(WithBatches | WithoutBatches, [command], "A test.")
            raise MemoryError

    for command, has_flag in (("with-batches", True), ("without-batches", False)):
        with pytest.raises(SystemExit):
            run(command)
        assert ("lower --batch-size" in capsys.readouterr().err) is has_flag


def test_other_runtime_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="a mistake"), one_line_errors():
        raise RuntimeError("a mistake in the code")


def test_an_error_below_a_bar_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with one_line_errors(), bar(total=3, delay=0.1) as progress:
            progress.write("a message")
            raise ValueError("width is 0, expected more")

    with pytest.raises(SystemExit):
        fail()
    assert capsys.readouterr().err.splitlines()[-1] == "error: width is 0, expected more"


def test_a_bar_that_was_not_shown_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors(), bar(total=3, delay=9):
        raise ValueError("width is 0, expected more")
    assert capsys.readouterr().err == "error: width is 0, expected more\n"


def test_progress_bars_share_one_thread() -> None:
    bar(total=1).close()
    before = threading.active_count()
    for _ in range(3):
        bar(total=1).close()
    assert threading.active_count() == before
