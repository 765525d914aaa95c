"""Run a stage of a recipe on a borrowed GPU, some minutes at a time, and take its state home.

    python benchmarks/gpu.py --minutes 9 --to PIECES train_dvae.py toy --data toybox --out runs/dvae
    python benchmarks/gpu.py --minutes 9 --from OLD --to PIECES --wheels WHEELS train_dvae.py ...
    python benchmarks/gpu.py --to PIECES -m dalle1.data.codes --dvae runs/dvae --out runs/codes

Runs a command of this checkout, which needs no installing, and stops it by SIGTERM when the time is
up. Then the folder that its --out names, checkpoint, log and all, lies in PIECES, in files under
16 MiB. Given those by --from, the same command goes on elsewhere as if it had never stopped; a
folder that is there already is newer, and stays. So it runs what keeps its state in a folder --out:
the trainings, train_toy.py, and dalle1.data.codes, dalle1.data.toybox and dalle1.join by -m; not
`evaluate.py judge`, whose --out is a file. Python packages that the machine lacks may lie in
WHEELS, as `pip download` leaves them: tyro with docstring-parser and typeguard, and to write shards
webdataset with braceexpand.

`toy`'s transformer resumes from 184 MB; what draws is 26 MB, CLIP included, once `-m dalle1.join`,
run like this, has rounded it.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIECE = 15 * 2**20  # bytes
GRACE = 60  # seconds to finish a step and save


class Pieces(io.RawIOBase):
    """A file to write to that is cut into files of `size` bytes: 000.partial, 001.partial, ..."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.written = folder, size, 0

    def writable(self) -> bool:
        return True

    def write(self, content: bytes) -> int:  # type: ignore[override]
        number, used = divmod(self.written, self.size)
        taken = bytes(content[: self.size - used])
        with (self.folder / f"{number:03d}.partial").open("ab") as piece:
            piece.write(taken)
        self.written += len(taken)
        return len(taken)


def pieces_in(folder: Path, name: str = r"\d{3,}-of-\d{3,}") -> list[Path]:
    """Give the files of that name in order."""
    found = [path for path in folder.iterdir() if re.fullmatch(name, path.name)]
    return sorted(found, key=lambda path: int(re.split("[-.]", path.name)[0]))


def split(folder: Path, to: Path, size: int = PIECE) -> list[Path]:
    """Write all that is in `folder` into files of `size` bytes, named N-of-COUNT."""
    to.mkdir(parents=True, exist_ok=True)
    partial = r"\d{3,}\.partial"
    for old in (*pieces_in(to), *pieces_in(to, partial)):
        old.unlink()
    with (
        io.BufferedWriter(Pieces(to, size)) as stream,
        gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=0) as checked,  # for its checksum
        tarfile.open(fileobj=checked, mode="w|") as tar,
    ):
        tar.add(folder, arcname=".")
    pieces = pieces_in(to, partial)
    return [p.rename(to / f"{p.stem}-of-{len(pieces):03d}") for p in pieces]


def join(pieces: Path, folder: Path) -> None:
    """Bring back what `split` wrote, whole; ValueError where a piece is missing or damaged."""
    found = pieces_in(pieces)
    count = int(found[0].name.partition("-of-")[2]) if found else 0
    if not found or [p.name for p in found] != [f"{i:03d}-of-{count:03d}" for i in range(count)]:
        raise ValueError(f"{pieces} holds {len(found)} pieces, expected {count or 'some'}, of one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside,
        tempfile.TemporaryFile() as whole,
    ):
        for piece in found:
            whole.write(piece.read_bytes())
        whole.seek(0)
        try:
            with tarfile.open(fileobj=whole) as tar:
                tar.extractall(Path(beside, "all"), filter="data")
                while tar.fileobj and tar.fileobj.read(PIECE):  # to the end, where the checksum is
                    pass
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"a piece in {pieces} is damaged: bring them here anew") from error
        os.replace(Path(beside, "all"), folder)


def install(wheels: Path) -> str:
    """Unpack wheels into a folder of their own, and give it; ValueError where that fails."""
    if not (found := [str(path) for path in wheels.glob("*.whl")]):
        raise ValueError(f"{wheels} holds no .whl, expected some, as `pip download` leaves them")
    site = tempfile.mkdtemp(prefix="site-")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    if subprocess.run([*pip, "--target", site, *found], check=False).returncode:
        raise ValueError(f"pip could not unpack {wheels}, as it says above")
    return site


def run_for(seconds: float, command: Sequence[str], path: Sequence[str]) -> int:
    """Run a command of Python's for so long at most, or until a signal; give its exit code."""
    known = filter(None, [*path, os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(known)}
    # In a session of its own: nothing that it started may write on while its folder is packed.
    child = subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True)
    try:
        try:
            return child.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            child.terminate()
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def main(args: Sequence[str] | None = None) -> None:
    about = f"{__doc__.splitlines()[0]} The command must keep its state in a folder --out."
    parser = argparse.ArgumentParser(
        description=about, allow_abbrev=False, usage="%(prog)s [options] --to TO COMMAND ..."
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="until it is stopped")
    parser.add_argument("--to", type=Path, required=True, help="folder for the pieces")
    parser.add_argument("--from", type=Path, dest="start", help="folder of pieces to go on from")
    parser.add_argument("--wheels", type=Path, help="folder of packages that the machine lacks")
    parser.add_argument("--piece", type=int, default=PIECE, help="bytes of a piece")
    rest = argparse.REMAINDER
    parser.add_argument("-m", nargs=rest, metavar="MODULE", help="the command, if it is a module")
    parser.add_argument("command", nargs=rest, help="a training's script, or -m MODULE, and flags")
    options = parser.parse_args(args)
    command = ["-m", *options.m] if options.m else options.command
    its = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    its.add_argument("--out", type=Path)
    out = its.parse_known_args(command)[0].out
    if out is None:
        parser.error("the command has no --out FOLDER")
    if out.is_file() or out.suffix == ".safetensors":
        parser.error(f"--out {out} is a file, expected a folder: only that can be taken home")
    path = [str(ROOT)]
    try:
        if options.start and not out.exists():
            join(options.start, out)
        if options.wheels:
            path.append(install(options.wheels))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    code = run_for(60 * options.minutes, command, path)
    if out.exists():
        pieces = split(out, options.to, options.piece)
        print(f"{out} is in {len(pieces)} pieces in {options.to}")
    raise SystemExit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the command, and packs
    main()
