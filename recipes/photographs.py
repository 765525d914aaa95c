"""Cut the photographs in scikit-image's wheel into captioned tiles: a dataset of real images.

    pip install scikit-image
    python recipes/photographs.py --out runs/photographs
    python train_dvae.py small --data runs/photographs --steps 4000 --temperature-steps 3300 \
        --out runs/photographs-dvae

Captions are what scikit-image's documentation calls them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

PHOTOGRAPHS = {
    "astronaut.png": "Color image of the astronaut Eileen Collins",
    "brick.png": "Brick wall",
    "camera.png": "Gray-level camera image",
    "chelsea.png": "Chelsea the cat",
    "coffee.png": "Coffee cup",
    "coins.png": "Greek coins from Pompeii",
    "grass.png": "Grass",
    "gravel.png": "Gravel",
    "hubble_deep_field.jpg": "Hubble eXtreme Deep Field",
    "ihc.png": "Immunohistochemical staining with hematoxylin counterstaining",
    "moon.png": "Surface of the moon",
    "motorcycle_left.png": "Stereo image of a motorcycle, left",
    "motorcycle_right.png": "Stereo image of a motorcycle, right",
    "retina.jpg": "Human retina",
    "rocket.jpg": "Launch photo of DSCOVR on Falcon 9 by SpaceX",
}


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """Yield caption and image."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-image is not installed: pip install scikit-image")
    for name, caption in PHOTOGRAPHS.items():
        path = Path(spec.origin).parent / "data" / name
        yield caption, Image.open(path).convert("RGB")


def tiles(size: int) -> list[tuple[str, Image.Image]]:
    """Cut all photographs, without overlap, and shuffle: the last ones are validated on."""
    found = []
    for caption, photograph in photographs():
        for top in range(0, photograph.height - size + 1, size):
            for left in range(0, photograph.width - size + 1, size):
                found.append((caption, photograph.crop((left, top, left + size, top + size))))
    random.Random(0).shuffle(found)
    return found


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128, help="side of a tile in pixels")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    options = parse(args)
    pairs = tiles(options.size)
    options.out.mkdir(parents=True, exist_ok=True)
    for i, (caption, tile) in enumerate(pairs):
        tile.save(options.out / f"{i:04d}.png")
        (options.out / f"{i:04d}.txt").write_text(caption + "\n", encoding="utf-8")
    print(f"{len(pairs)} tiles of {options.size} × {options.size} are in {options.out}")


if __name__ == "__main__":
    main()
