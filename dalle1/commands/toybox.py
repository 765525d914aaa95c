"""Write Toybox as WebDataset shards, in the layout that img2dataset uses.

    dalle1 toybox --out data/toybox --num-scenes 10000 --size 256

The folder receives `00000.tar`, `00001.tar`, … Each shard holds, for every scene, `000000000.png`
(the image), `.txt` (its captions, one per line) and `.json` (the first caption and the scene that
the image was rendered from). Five digits of a key number the shard, four the scene within it.
The same arguments write the same bytes. After an interruption, the same command resumes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from dalle1.console import bar, one_line_errors, parse
from dalle1.locking import folder_lock
from dalle1.storage import claim
from dalle1.toybox import Toybox

MAX_SHARD_SIZE = 10_000  # four digits of a key number the scenes of a shard
SETTINGS_NAME = "toybox.json"


@dataclass(frozen=True, kw_only=True)
class ToyboxConfig:
    """Options of `dalle1 toybox`."""

    out: Path
    """Folder for the shards."""
    num_scenes: int = 1000
    """Number of scenes to render."""
    size: int = 256
    """Image side in pixels."""
    seed: int = 0
    """Random seed; each seed has its own scenes."""
    split: Literal["train", "validation", "heldout", "all"] = "train"
    """Split of the combinations: "heldout" scenes hold pairs that training never shows."""
    shares: tuple[float, float, float] | None = None
    """Weights of scenes with two kinds of objects in a relation, of others in a style, and of the
    rest. By default, Toybox's own: about 25 19 56 in training."""
    shard_size: int = 1000
    """Scenes per shard."""
    captions: int = 1
    """Maximum number of captions per scene."""
    processes: int = 1
    """Number of processes, each of which writes whole shards."""


def encode_sample(dataset: Toybox, index: int, key: str, captions: int = 1) -> dict[str, Any]:
    """Return scene `index` as one WebDataset sample named `key`, its fields in bytes.

    Args:
        captions: maximum number of captions; duplicates are written once.
    """
    image, caption = dataset[index]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    phrased = [
        dataset.caption(index, random.Random(f"{dataset.split}/{dataset.seed}/{index}/caption {i}"))
        for i in range(1, captions)
    ]
    facts = {
        "caption": caption,
        "key": key,
        "width": image.width,
        "height": image.height,
        "split": dataset.split,
        "seed": dataset.seed,
        "scene": dataset.scene(index).to_dict(),
    }
    return {
        "__key__": key,
        "json": json.dumps(facts, sort_keys=True).encode(),
        "png": buffer.getvalue(),
        "txt": "\n".join(dict.fromkeys([caption, *phrased])).encode(),
    }


def write_shards(
    dataset: Toybox, out: Path, shard_size: int = 1000, captions: int = 1, processes: int = 1
) -> list[Path]:
    """Write every scene of a finite dataset into shards under `out`; return their paths.

    Existing shards are kept.

    Raises: ValueError where `out` holds shards of other settings.
    """
    if dataset.num_scenes is None:
        raise ValueError("got an endless Toybox, expected a finite one: set num_scenes")
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise ValueError(
            f"got shard_size {shard_size}, expected 1 to {MAX_SHARD_SIZE}: 1000 is usual"
        )
    if captions < 1 or processes < 1:
        raise ValueError(f"got captions {captions} and processes {processes}, expected at least 1")
    world = {name: getattr(dataset, name) for name in ("split", "size", "seed", "num_scenes")}
    if dataset.shares is not None:
        world["shares"] = list(dataset.shares)
    claim(out / SETTINGS_NAME, {**world, "shard_size": shard_size, "captions": captions})
    _remove_partial_files(out)
    starts = range(0, len(dataset), shard_size)
    paths = [out / f"{start // shard_size:05d}.tar" for start in starts]
    scenes = {p: range(s, min(s + shard_size, len(dataset))) for p, s in zip(paths, starts)}
    missing = [path for path in paths if not path.exists()]
    write = partial(_write_shard, dataset, captions)
    done = sum(len(scenes[path]) for path in paths if path not in missing)
    with (
        bar(total=len(dataset), initial=done, unit="scene", desc="toybox") as progress,
        _pool(processes) as pool,
    ):
        run = map if processes == 1 else pool.map
        for count in run(write, missing, [scenes[path] for path in missing]):
            progress.update(count)
    return paths


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose workers end with this process, whatever ends it."""
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, initializer=_start_worker) as pool:
        try:
            yield pool
        except BaseException:  # otherwise the workers would finish their shards first
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


def _start_worker() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _remove_partial_files(out: Path) -> None:
    """Remove unfinished files of processes that no longer run."""
    for path in out.glob(".*.tar.*.partial") if os.name == "posix" else ():
        try:
            os.kill(int(path.suffixes[-2][1:]), 0)  # sends no signal, only checks
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:  # the process belongs to another user
            pass


def _write_shard(dataset: Toybox, captions: int, path: Path, scenes: range) -> int:
    """Write some scenes as one shard, atomically; return their number."""
    import webdataset

    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # mtime, user and group are fixed so that the same scenes have the same bytes.
    with (
        partial_path.open("wb") as stream,
        webdataset.TarWriter(
            stream, encoder=False, mtime=0, user="dalle1", group="dalle1"
        ) as writer,
    ):
        for number, index in enumerate(scenes):
            key = f"{path.stem}{number:04d}"
            writer.write(encode_sample(dataset, index, key, captions))
    os.replace(partial_path, path)
    return len(scenes)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit that also ends the worker processes."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(args: Sequence[str] | None = None) -> None:
    about = "Render Toybox, a procedural dataset of captioned images, as WebDataset shards."
    with one_line_errors(), _exit_on_sigterm():
        config = parse(ToyboxConfig, args, about)
        dataset = Toybox(config.split, config.size, config.seed, config.num_scenes, config.shares)
        with folder_lock(config.out):
            shards = write_shards(
                dataset, config.out, config.shard_size, config.captions, config.processes
            )
        print(f"{len(dataset)} scenes in {len(shards)} shards: {shards[0]} … {shards[-1]}")
