"""Fuzzed images and masks, of every format that Pillow reads."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from fuzz.text import Choose
from fuzz.world import SUFFIXES, World

MASK_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I")
SEEDS = st.integers(0, 2**48)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a file as transfers and attackers leave it; of two cases in ten, it stays sound."""
    changed = bytearray(content)
    kind = rng.choice(
        ["sound", "cut", "bits", "bits", "header", "header", "size", "grow", "splice"]
    )
    if not changed or kind == "sound":
        pass
    elif kind == "cut":
        del changed[rng.randrange(len(changed)) :]
    elif kind == "bits":
        for _ in range(rng.choice([1, 4, 40])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "header":
        for _ in range(rng.choice([1, 2, 8])):
            changed[rng.randrange(min(64, len(changed)))] = rng.randrange(256)
    elif kind == "size":  # an absurd number where a file may say how much follows
        at, width = rng.randrange(min(256, len(changed))), rng.choice([2, 4, 8])
        value = rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1])
        value &= (1 << 8 * width) - 1
        changed[at : at + width] = value.to_bytes(width, rng.choice(["big", "little"]))
    elif kind == "grow":
        changed += bytes(rng.choice([1, 512, 70_000]))
    else:
        at, length = rng.randrange(len(changed)), rng.randrange(1, 200)
        changed[at:at] = changed[rng.randrange(len(changed)) :][:length]
    return bytes(changed)


def image_file(choose: Choose, world: World, folder: Path, name: str) -> Path:
    """Write a damaged image under a name of any kind of image."""
    rng = random.Random(choose(SEEDS))
    path = folder / (name + rng.choice(SUFFIXES))
    path.write_bytes(damaged(rng.choice(world.image_files), rng))
    return path


def images(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Encode, complete, rank or check damaged images."""
    folder, out, model = scratch / "in", str(scratch / "out"), str(world.model)
    path = image_file(choose, world, folder, "a")
    if choose(st.booleans()):
        Image.new("RGB", (40, 36)).save(folder / "b.png")
        (folder / "b.txt").write_text("a red cube")
        path.with_suffix(".txt").write_text("a blue star") if path.suffix != ".txt" else None
    on = ["--device", "cpu", "--out"]
    known = ["--keep-rows", "2", "--num-candidates", "1", "--num-images", "1", *on, out]
    how = {
        "compress": ["compress", str(path), "--model", model, *on, out + "/a.d1c"],
        "sample": ["sample", "a cube", "--model", model, "--image", str(path), *known],
        "rank": ["rank", "a red cube", str(folder), "--clip", model + "/clip", *on, out],
        "check": ["check", str(folder), "--num-workers", "0", "--out", out],
        "dvae": ["evaluate", "dvae", "--model", model, "--data", str(folder), "--precision",
                 "fp32", "--allow-upscale", *on, out],
        "samples": ["evaluate", "samples", "--images", str(folder), "--clip", model + "/clip",
                    *on, out],
    }  # fmt: skip
    return how[choose(st.sampled_from(sorted(how)))]


def masks(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Sample the part of an image that a mask of any size, mode and content marks."""
    folder, rng = scratch / "in", random.Random(choose(SEEDS))
    Image.effect_noise((40, 36), 90).convert("RGB").save(folder / "image.png")
    if rng.random() < 0.3:
        mask = image_file(choose, world, folder, "mask")
    else:
        mask, size = (
            folder / "mask.png",
            rng.choice([(40, 36), (40, 36), (36, 40), (1, 1), (40, 1)]),
        )
        shown = Image.effect_noise(size, rng.choice([0, 50, 200])).convert(rng.choice(MASK_MODES))
        if shown.mode in ("LA", "RGBA") and rng.random() < 0.7:
            shown.putalpha(Image.effect_noise(size, 200).point(lambda v: 255 * (v > 128)))
        shown.save(mask)
        if rng.random() < 0.3:
            mask.write_bytes(damaged(mask.read_bytes(), rng))
    out = ["--device", "cpu", "--out", str(scratch / "out")]
    files = ["--image", str(folder / "image.png"), "--mask", str(mask)]
    one = ["--num-candidates", "1", "--num-images", "1"]
    return ["sample", "a red cube", "--model", str(world.model), *files, *one, *out]
