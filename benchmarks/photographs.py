"""Cut the photographs inside scikit-image's wheel into tiles, to see a dVAE train on real pictures.

pip install scikit-image
python benchmarks/photographs.py --out runs/photographs
python train_dvae.py small --data runs/photographs --steps 1500 --out runs/photographs-dvae
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg"),
)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128, help="side of a tile in pixels")
    options = parser.parse_args(args)
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-image is not installed: pip install scikit-image")
    size, tiles = options.size, []
    for name in PHOTOGRAPHS:
        photograph = Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")
        for top in range(0, photograph.height - size + 1, size):
            for left in range(0, photograph.width - size + 1, size):
                tiles.append(photograph.crop((left, top, left + size, top + size)))
    random.Random(0).shuffle(tiles)  # the last ones are validated on
    options.out.mkdir(parents=True, exist_ok=True)
    for i, tile in enumerate(tiles):
        tile.save(options.out / f"{i:04d}.png")
    print(f"{len(tiles)} tiles of {size} × {size} are in {options.out}")


if __name__ == "__main__":
    main()
