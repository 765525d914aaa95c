"""Run a stage of a recipe on a borrowed GPU, some minutes at a time, and take its state home.

    python benchmarks/gpu.py --minutes 9 --to PIECES train_dvae.py toy --data toybox --out runs/dvae
    python benchmarks/gpu.py --minutes 9 --from OLD --to PIECES --wheels WHEELS train_dvae.py ...

Runs a command of this checkout, which needs no installing, and stops it when the time is up, as
Ctrl-C would. Then the folder that its --out names, checkpoint, log and all, lies in PIECES, in
files under 16 MiB. Given those by --from, the same command goes on elsewhere as if it had never
stopped; a folder that is there already is newer, and stays. Python packages that the machine lacks
may lie in WHEELS, as `pip download` leaves them: tyro with docstring-parser and typeguard, and to
write shards webdataset with braceexpand.

`toy`'s transformer resumes from 310 MB; what draws is 40 MB once `-m dalle1.join`, run like this,
has rounded it.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIECE = 15 * 2**20  # bytes
GRACE = 60  # seconds to finish a step and save


class Pieces(io.RawIOBase):
    """A file to write to that is cut into files of `size` bytes: 000, 001, ..."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.written = folder, size, 0

    def writable(self) -> bool:
        return True

    def write(self, content: bytes) -> int:  # type: ignore[override]
        number, used = divmod(self.written, self.size)
        taken = bytes(content[: self.size - used])
        with (self.folder / f"{number:03d}").open("ab") as piece:
            piece.write(taken)
        self.written += len(taken)
        return len(taken)


def split(folder: Path, to: Path, size: int = PIECE) -> list[Path]:
    """Write all that is in `folder` into files of `size` bytes, named N-of-COUNT."""
    to.mkdir(parents=True, exist_ok=True)
    for old in to.iterdir():
        if re.fullmatch(r"\d{3}(-of-\d{3})?", old.name):
            old.unlink()
    with (
        io.BufferedWriter(Pieces(to, size)) as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        tar.add(folder, arcname=".")
    pieces = sorted(p for p in to.iterdir() if re.fullmatch(r"\d{3}", p.name))
    return [p.rename(to / f"{p.name}-of-{len(pieces):03d}") for p in pieces]


def join(pieces: Path, folder: Path) -> None:
    """Bring back what `split` wrote; ValueError where a piece is missing."""
    found = sorted(p for p in pieces.iterdir() if re.fullmatch(r"\d{3}-of-\d{3}", p.name))
    count = int(found[0].name[-3:]) if found else 0
    if not found or [p.name for p in found] != [f"{i:03d}-of-{count:03d}" for i in range(count)]:
        raise ValueError(f"{pieces} holds {len(found)} pieces, expected {count or 'some'}, of one")
    with tempfile.TemporaryFile() as whole:
        for piece in found:
            whole.write(piece.read_bytes())
        whole.seek(0)
        with tarfile.open(fileobj=whole) as tar:
            tar.extractall(folder, filter="data")


def install(wheels: Path) -> str:
    """Unpack wheels into a folder of their own, and give it."""
    site = tempfile.mkdtemp(prefix="site-")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", site, *map(str, wheels.glob("*.whl"))], check=True)
    return site


def run_for(seconds: float, command: Sequence[str], path: Sequence[str]) -> int:
    """Run a command of Python's for so long at most; give its exit code."""
    known = filter(None, [*path, os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(known)}
    with subprocess.Popen([sys.executable, *command], env=environment) as child:
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGTERM)
        try:
            return child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="until it is stopped")
    parser.add_argument("--to", type=Path, required=True, help="folder for the pieces")
    parser.add_argument("--from", type=Path, dest="start", help="folder of pieces to go on from")
    parser.add_argument("--wheels", type=Path, help="folder of packages that the machine lacks")
    parser.add_argument("--piece", type=int, default=PIECE, help="bytes of a piece")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script or -m module, and flags")
    options = parser.parse_args(args)
    command = options.command
    if "--out" not in command[:-1]:
        parser.error("the command has no --out FOLDER")
    out = Path(command[command.index("--out") + 1])
    if options.start and not out.exists():
        try:
            join(options.start, out)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    path = [str(ROOT), *([install(options.wheels)] if options.wheels else [])]
    code = run_for(60 * options.minutes, command, path)
    if out.exists():
        pieces = split(out, options.to, options.piece)
        print(f"{out} is in {len(pieces)} pieces in {options.to}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
