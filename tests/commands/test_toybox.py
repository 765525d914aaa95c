"""Toybox's shards: layout, resuming, worker processes and errors."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from dalle1.commands.toybox import main
from dalle1.toybox import Scene, Toybox


def test_shards_have_the_usual_layout_and_the_same_bytes_twice(tmp_path: Path) -> None:
    arguments = ["--num-scenes", "5", "--size", "32", "--shard-size", "3", "--seed", "4"]
    for folder in ("one", "two"):
        main(["--out", str(tmp_path / folder), *arguments])
    shards = sorted((tmp_path / "one").glob("*.tar"))
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar"]
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()
    world = Toybox(size=32, seed=4)
    with tarfile.open(shards[1]) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    keys = ["000010000", "000010001"]
    assert sorted(files) == [f"{key}.{kind}" for key in keys for kind in ("json", "png", "txt")]
    facts = json.loads(files["000010000.json"])
    assert files["000010000.txt"].decode() == facts["caption"] == world.caption(3)
    assert Scene.from_dict(facts["scene"]) == world.scene(3)
    image = Image.open(io.BytesIO(files["000010000.png"]))
    assert image.tobytes() == world[3][0].tobytes()


def test_writing_resumes_after_the_last_complete_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--num-scenes", "5", "--size", "32", "--shard-size", "2", "--captions", "6"]
    for folder, more in (("whole", []), ("cut", ["--processes", "2"])):
        main(["--out", str(tmp_path / folder), *arguments, *more])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (cut / "00001.tar").unlink()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        stale = cut / f".00001.tar.{gone.pid}.partial"
    stale.write_bytes(b"half")
    others = cut / f".00001.tar.{os.getppid()}.partial"  # of a running process
    others.write_bytes(b"half")
    untouched = (cut / "00000.tar").stat().st_mtime_ns
    for _ in range(2):  # the second run finds every shard
        main(["--out", str(cut), *arguments])
    assert (cut / "00000.tar").stat().st_mtime_ns == untouched
    assert (stale.exists(), others.exists()) == (False, True)
    for shard in whole.glob("*.tar"):
        assert shard.read_bytes() == (cut / shard.name).read_bytes()
    with tarfile.open(whole / "00000.tar") as tar:
        captions = tar.extractfile("000000000.txt").read().decode().split("\n")  # type: ignore[union-attr]
    assert captions[0] == Toybox(size=32).caption(0)
    assert len(captions) == len(set(captions)) > 2
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(cut), *arguments, "--size", "48"])
    assert "holds results of other settings (size differ)" in capsys.readouterr().err


def test_shares_are_those_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--num-scenes", "2", "--size", "32"]
    main([*arguments, "--shares", "1", "0", "0"])
    with tarfile.open(tmp_path / "00000.tar") as tar:
        facts = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]  # type: ignore[union-attr]
    assert [fact["scene"]["relation"] is None for fact in facts] == [False, False]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "holds results of other settings (shares differ)" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_workers_end_with_the_first_process(number: int, code: int, tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--num-scenes", "4000", "--size", "32", "--processes", "2"]
    command = [sys.executable, "-m", "dalle1", "toybox", *words]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as first:
        while first.poll() is None and len(list(tmp_path.glob("*.partial"))) < 2:
            time.sleep(0.02)
        first.send_signal(number)
        printed = first.communicate(timeout=20)[1]  # until the last worker has closed it
    assert first.returncode == code
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("*.tar"))


def test_ctrl_c_prints_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle1.commands.toybox.encode_sample", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["--out", str(tmp_path), "--num-scenes", "1", "--size", "32"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "3"], "got size 3"),
        (["--num-scenes", "0"], "got --num-scenes 0"),
        (["--num-scenes", "1", "--shard-size", "0"], "got --shard-size 0"),
        (["--shares", "0", "0", "0"], "got shares 0 0 0, expected three weights"),
        (["--shares", "1e308", "1e308", "1e308"], "expected three weights"),
        (["--shares", "1", "nan", "1"], "got shares 1 nan 1, expected three weights"),
        (
            ["--num-scenes", "1", "--out", "{file}/below"],
            "below (Not a directory); use another --out",
        ),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    words = [argument.format(file=file) for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "out"), *words])
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
