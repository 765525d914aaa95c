"""A training that moves from machine to machine in pieces is the one that never moved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import train_dvae

ROOT = Path(__file__).resolve().parent.parent
GPU = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
TRAIN = [
    *(str(ROOT / "train_dvae.py"), "toy", "--data", "toybox:4", "--model.image-size", "64"),
    *("--model.width", "8", "--model.codebook-size", "16", "--crop-size", "32"),
    *("--validation-pictures", "1", "--batch-size", "2", "--num-workers", "0", "--device", "cpu"),
    *("--log-every", "1", "--schedule-steps", "4", "--validate-every", "4"),
]
SLEEPER = """
import pathlib, signal, subprocess, sys, time, wheeled
out = pathlib.Path(sys.argv[-1].removeprefix("--out="))
def stop(*_):
    (out / "saved").write_text("yes")
    raise SystemExit(0)
signal.signal(signal.SIGTERM, stop)
out.mkdir()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # has our output open
time.sleep(600)
"""
WRITER = """
import pathlib, sys
out = pathlib.Path(sys.argv[-1])
out.mkdir(exist_ok=True)
for name in sys.argv[1:-2]:
    (out / name).write_text(name * 1000)
"""


def gpu(cwd: Path, *words: str, code: int = 0) -> str:
    cwd.mkdir(exist_ok=True)
    done = subprocess.run(
        [*GPU, *words], cwd=cwd, timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def losses(out: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    speed = ("samples_per_second", "memory_gib")
    return [{k: v for k, v in line.items() if k not in speed} for line in lines]


def test_a_training_in_pieces_has_the_losses_of_a_whole_one(tmp_path: Path) -> None:
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    train = [*TRAIN, "--out", "run"]
    train_dvae.main([*TRAIN[1:], "--out", str(whole / "run"), "--steps", "4"])
    gpu(first, "--to", "pieces", "--piece", "50000", *train, "--steps", "2")
    pieces = sorted((first / "pieces").iterdir())
    assert len(pieces) > 3
    assert max(piece.stat().st_size for piece in pieces) == 50_000
    gpu(second, "--from", "../first/pieces", "--to", "pieces", *train, "--steps", "4")
    assert len(losses(whole / "run")) == 5
    moved = [x for x in losses(second / "run") if "total" in x or x["step"] == 4]
    assert moved == losses(whole / "run")
    pieces[1].unlink()
    said = gpu(tmp_path / "third", "--from", "../first/pieces", "--to", "x", *train, code=2)
    assert f"holds {len(pieces) - 1} pieces, expected {len(pieces)}" in said


def test_a_command_is_stopped_in_time_and_has_its_wheels(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    words = ["--minutes=0.05", "--wheels", "wheels", "--to", "pieces", "-m", "sleeper"]
    assert "wheels holds no .whl" in gpu(tmp_path, *words, "--out=run", code=2)
    with zipfile.ZipFile(wheels / "wheeled-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("wheeled.py", "")
        about = "Metadata-Version: 2.1\nName: wheeled\nVersion: 1\n"
        tags = "Wheel-Version: 1.0\nTag: py3-none-any\n"
        for name, content in {"METADATA": about, "WHEEL": tags, "RECORD": ""}.items():
            wheel.writestr(f"wheeled-1.dist-info/{name}", content)
    said = gpu(tmp_path, *words, "--out=run")
    assert (tmp_path / "run" / "saved").read_text() == "yes"
    assert "run is in 1 pieces in pieces" in said
    assert "no --out FOLDER" in gpu(tmp_path, *words, code=2)


def test_thousands_of_pieces_come_back_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "writer.py").write_text(WRITER)
    command = ["-m", "writer", *"abc", "--out", "run"]
    gpu(tmp_path, "--to", "pieces", "--piece", "10", *command)
    pieces = tmp_path / "pieces"
    assert len(list(pieces.iterdir())) > 1000
    again = ["--from", "pieces", "--to", "again", "-m", "writer", "d", "--out", "back/run"]
    gpu(tmp_path, *again)
    whole, back = tmp_path / "run", tmp_path / "back"
    assert {f.name: f.read_text() for f in (back / "run").iterdir() if f.name != "d"} == {
        f.name: f.read_text() for f in whole.iterdir()
    }
    assert [folder.name for folder in back.iterdir()] == ["run"]
    shutil.rmtree(back)
    damaged = sorted(pieces.iterdir(), key=lambda piece: int(piece.name.partition("-")[0]))[400]
    for content in (b"!" * 10, b"", damaged.read_bytes()[:5]):
        damaged.write_bytes(content)
        said = gpu(tmp_path, *again, code=2)
        assert said.strip().endswith("error: a piece in pieces is damaged: bring them here anew")
        assert not list(back.iterdir())


def test_what_writes_a_file_is_refused(tmp_path: Path) -> None:
    judge = ["evaluate.py", "judge", "--out", "judge.safetensors"]
    assert "expected a folder" in gpu(tmp_path, "--to", "pieces", *judge, code=2)


def test_a_failure_is_the_commands_own(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit(7)")
    gpu(tmp_path, "--to", "pieces", "fails.py", "--out", "run", code=7)
    assert not (tmp_path / "pieces").exists()
