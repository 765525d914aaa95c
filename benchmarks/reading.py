"""Measure how fast JPEGs become training examples, beside Pillow alone doing no more than it must.

    python benchmarks/reading.py

Pillow alone: read the file, draft, decode, resize, crop, copy to an array, in a bare loop. Ours:
what a training's worker does, from the shards on disk to a stacked batch, with every check of what
may be damaged. Both in one process and one thread, in turns; the median of the turns' ratios.
The images are the photographs of scikit-image's wheel (`pip install scikit-image`), enlarged to
the sizes that are asked for; `--folder` takes JPEGs of your own.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from photographs import photographs
from PIL import Image
from torch import Tensor

from dalle1.data import LoaderConfig, ReadOptions, Sample
from dalle1.data.cleaning import CleaningConfig
from dalle1.data.crops import Augmentation, augmented
from dalle1.data.images import to_tensor
from dalle1.data.sources.indexed_shards import IndexedShards

BATCH = 15  # as many as there are photographs


def write_jpegs(folder: Path, side: int) -> list[Path]:
    """Write each photograph with a shorter side of `side`, as quality 90."""
    paths = []
    for i, (*_, photograph) in enumerate(photographs()):
        scale = side / min(photograph.size)
        size = tuple(max(side, round(scale * length)) for length in photograph.size)
        paths.append(folder / f"{i:09d}.jpg")
        photograph.resize(size, Image.Resampling.LANCZOS).save(paths[-1], quality=90)
    return paths


def alone(paths: Sequence[Path], size: int, rng: random.Random) -> None:
    """Draft, decode, resize and crop by Pillow, as much as a training at `size` needs."""
    for path in paths:
        image = Image.open(io.BytesIO(path.read_bytes()))
        resized = rng.randint(round(1.125 * size), round(1.5 * size))
        image.draft("RGB", (round(1.5 * size), round(1.5 * size)))
        image = image.convert("RGB")
        side = min(image.size)
        left, top = (rng.randint(0, length - side) for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((resized, resized), Image.Resampling.BOX)
        left, top = (rng.randint(0, resized - size) for _ in range(2))
        np.array(image.crop((left, top, left + size, top + size)))


def prepare(size: int, sample: Sample, rng: random.Random) -> Mapping[str, Tensor]:
    return {"images": to_tensor(augmented(sample.image(), size, rng, Augmentation()))}


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(paths: Sequence[Path], size: int, repeats: int) -> dict[str, float]:
    """Return images per second and core, with and without draft mode, and the speed-up."""
    from webdataset import TarWriter

    shard = paths[0].with_name("00000.tar")
    with TarWriter(str(shard), encoder=False) as tar:
        for path in paths:
            tar.write({"__key__": path.stem, "jpg": path.read_bytes(), "txt": b"a photograph"})

    def ours(detail: int) -> Callable[[], object]:
        cleaning = CleaningConfig(max_aspect=10)
        source = IndexedShards(
            [shard], "encode", ReadOptions(cleaning=cleaning, decode_size=detail)
        )
        loader = source.loader(partial(prepare, size), LoaderConfig(batch_size=BATCH))
        stream = loader.batches(0)
        next(stream)
        count = max(1, len(paths) // BATCH)
        return lambda: list(islice(stream, count))

    contenders = {"dalle1": ours(round(1.5 * size)), "without draft mode": ours(0)}
    used = paths[: len(paths) // BATCH * BATCH] or paths
    times: dict[str, list[float]] = {name: [] for name in (*contenders, "Pillow alone")}
    for turn in range(repeats):
        rng = random.Random(turn)
        times["Pillow alone"].append(seconds(lambda: alone(rng.sample(used, len(used)), size, rng)))  # noqa: B023
        for name, work in contenders.items():
            times[name].append(seconds(work))
    count = max(1, len(paths) // BATCH) * BATCH
    rates = {name: count / float(np.median(spent)) for name, spent in times.items()}
    ratios = [b / a for a, b in zip(times["dalle1"], times["Pillow alone"], strict=True)]
    return {**rates, "dalle1 / Pillow alone": float(np.median(ratios))}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="side of the crops in pixels")
    parser.add_argument("--sides", type=int, nargs="+", default=[400, 800, 1600, 3200])
    parser.add_argument("--folder", type=Path, help="of JPEGs, instead of the photographs")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    for side in [0] if options.folder else options.sides:
        with tempfile.TemporaryDirectory() as folder:
            if options.folder:
                paths = [Path(folder) / p.name for p in sorted(options.folder.glob("*.jpg"))]
                for path in paths:
                    path.write_bytes((options.folder / path.name).read_bytes())
            else:
                paths = write_jpegs(Path(folder), side)
            numbers = measure(paths, options.size, options.repeats)
        print(
            json.dumps({"side": side, **{k: round(v, 3) for k, v in numbers.items()}}), flush=True
        )


if __name__ == "__main__":
    main()
