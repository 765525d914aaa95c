"""Write Toybox as WebDataset shards, in the layout that img2dataset uses.

    python -m dalle1.data.toybox --out data/toybox --num-scenes 10000 --size 256

A folder of shards `00000.tar`, `00001.tar`, ...; in each, for every scene, `000000000.png` (the
picture), `.txt` (the caption) and `.json` (the caption, and the true scene to check answers by).
The nine digits are five for the shard and four for the place in it.
The same arguments write the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle1.data.toybox.dataset import Toybox
from dalle1.data.toybox.vocabulary import SPLITS

MAX_SHARD_SIZE = 10_000  # four digits of the key count within a shard


def encode_sample(dataset: Toybox, index: int, key: str) -> dict[str, Any]:
    """Return scene `index` as one WebDataset sample named `key`, its fields in bytes."""
    picture, caption = dataset[index]
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
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
        "txt": caption.encode(),
    }


def write_shards(dataset: Toybox, out: Path, shard_size: int = 1000) -> list[Path]:
    """Write every scene of a finite dataset into shards under `out`; return their paths."""
    if dataset.num_scenes is None:
        raise ValueError("got an endless Toybox, expected a finite one: set num_scenes")
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise ValueError(
            f"got shard_size {shard_size}, expected 1 to {MAX_SHARD_SIZE}: 1000 is usual"
        )
    import webdataset
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    shards = []
    with tqdm(total=len(dataset), unit="scene", desc="toybox") as progress:
        for start in range(0, len(dataset), shard_size):
            path = out / f"{start // shard_size:05d}.tar"
            # mtime, user and group are fixed so that the same world has the same bytes.
            with (
                path.open("wb") as stream,
                webdataset.TarWriter(
                    stream, encoder=False, mtime=0, user="dalle1", group="dalle1"
                ) as writer,
            ):
                for index in range(start, min(start + shard_size, len(dataset))):
                    key = f"{start // shard_size:05d}{index - start:04d}"
                    writer.write(encode_sample(dataset, index, key))
                    progress.update()
            shards.append(path)
    return shards


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for a mistake of the caller's."""
    parser = argparse.ArgumentParser(
        prog="python -m dalle1.data.toybox",
        description="Write Toybox, a drawn and captioned picture world, as WebDataset shards.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--num-scenes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--shard-size", type=int, default=1000, help="scenes in one file")
    args = parser.parse_args(argv)
    try:
        dataset = Toybox(args.split, args.size, args.seed, args.num_scenes)
        shards = write_shards(dataset, args.out, args.shard_size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(dataset)} scenes in {len(shards)} shards: {shards[0]} ... {shards[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
