"""Write Toybox as WebDataset shards, in the layout that img2dataset uses.

    python -m dalle1.toybox --out data/toybox --num-scenes 10000 --size 256

A folder of shards `00000.tar`, `00001.tar`, ...; in each, for every scene, `000000000.png` (the
picture), `.txt` (its captions, one a line) and `.json` (the first of them, and the true scene to
check answers by). The nine digits are five for the shard and four for the place in it.
The same arguments write the same bytes; interrupted, they go on after the last whole shard.
"""

from __future__ import annotations

import argparse
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
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from dalle1.console import one_line_errors
from dalle1.files import claim
from dalle1.toybox.dataset import Toybox
from dalle1.toybox.vocabulary import SPLITS

MAX_SHARD_SIZE = 10_000  # four digits of the key count within a shard
SETTINGS_NAME = "toybox.json"


def encode_sample(dataset: Toybox, index: int, key: str, captions: int = 1) -> dict[str, Any]:
    """Return scene `index` as one WebDataset sample named `key`, its fields in bytes.

    Args:
        captions: how many to write, the same ones but once.
    """
    picture, caption = dataset[index]
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    phrased = [
        dataset.caption(index, random.Random(f"{dataset.split}/{dataset.seed}/{index}/caption {i}"))
        for i in range(1, captions)
    ]
    facts = {
        "caption": caption,
        "key": key,
        "width": picture.width,
        "height": picture.height,
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

    Shards that are there already stay. ValueError where they are of other settings.
    """
    if dataset.num_scenes is None:
        raise ValueError("got an endless Toybox, expected a finite one: set num_scenes")
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise ValueError(
            f"got shard_size {shard_size}, expected 1 to {MAX_SHARD_SIZE}: 1000 is usual"
        )
    if captions < 1 or processes < 1:
        raise ValueError(f"got captions {captions} and processes {processes}, expected at least 1")
    from tqdm import tqdm

    world = {name: getattr(dataset, name) for name in ("split", "size", "seed", "num_scenes")}
    claim(out / SETTINGS_NAME, {**world, "shard_size": shard_size, "captions": captions})
    _sweep(out)
    starts = range(0, len(dataset), shard_size)
    paths = [out / f"{start // shard_size:05d}.tar" for start in starts]
    scenes = {p: range(s, min(s + shard_size, len(dataset))) for p, s in zip(paths, starts)}
    missing = [path for path in paths if not path.exists()]
    write = partial(_write_shard, dataset, captions)
    done = sum(len(scenes[path]) for path in paths if path not in missing)
    with (
        tqdm(total=len(dataset), initial=done, unit="scene", desc="toybox") as progress,
        _workers(processes) as others,
    ):
        run = map if processes == 1 else others.map
        for count in run(write, missing, [scenes[path] for path in missing]):
            progress.update(count)
    return paths


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Give processes that end with this one, whatever ends it."""
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, initializer=_begin_worker) as workers:
        try:
            yield workers
        except BaseException:  # else they would write what they have begun
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


def _begin_worker() -> None:
    """Leave signals to the process that started this one, and watch it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _sweep(out: Path) -> None:
    """Remove what processes that are no more have left half written."""
    for left in out.glob(".*.tar.*.partial") if os.name == "posix" else ():
        try:
            os.kill(int(left.suffixes[-2][1:]), 0)  # sends nothing
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except PermissionError:  # it is somebody else's
            pass


def _write_shard(dataset: Toybox, captions: int, path: Path, scenes: range) -> int:
    """Write some scenes, whole or not at all; give how many."""
    import webdataset

    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # mtime, user and group are fixed so that the same world has the same bytes.
    with (
        partial_path.open("wb") as stream,
        webdataset.TarWriter(
            stream, encoder=False, mtime=0, user="dalle1", group="dalle1"
        ) as writer,
    ):
        for place, index in enumerate(scenes):
            key = f"{path.stem}{place:04d}"
            writer.write(encode_sample(dataset, index, key, captions))
    os.replace(partial_path, path)
    return len(scenes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dalle1.toybox",
        description="Write Toybox, a drawn and captioned picture world, as WebDataset shards.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--num-scenes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--shard-size", type=int, default=1000, help="scenes in one file")
    parser.add_argument("--captions", type=int, default=1, help="of each scene, at most")
    parser.add_argument("--processes", type=int, default=1, help="that draw, each its own shards")
    args = parser.parse_args(argv)
    with one_line_errors():
        dataset = Toybox(args.split, args.size, args.seed, args.num_scenes)
        how = {"captions": args.captions, "processes": args.processes}
        shards = write_shards(dataset, args.out, args.shard_size, **how)
        print(f"{len(dataset)} scenes in {len(shards)} shards: {shards[0]} ... {shards[-1]}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends workers, too
    main()
