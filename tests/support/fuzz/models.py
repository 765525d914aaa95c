"""Fuzzed models: model folders, checkpoints, compressed files and foreign checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from damage import VALUES, damage

from fuzz.media import SEEDS, damaged
from fuzz.text import Choose
from fuzz.world import World


def spoil(folder: Path, world: World, rng: random.Random) -> None:
    """Damage one to three files of a folder, then perhaps replace one by a link or a pipe."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, RecursionError):
            damage(folder, rng)  # these errors come from a file that was damaged twice
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if files and rng.random() < 0.15:
        path = rng.choice(files)
        path.unlink()
        if rng.random() < 0.3:
            os.mkfifo(path)
        else:
            targets = (world.root / "secret.json", "/dev/zero", "../../x", "/etc/hostname", ".")
            path.symlink_to(rng.choice(targets))


def models(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Use a damaged model folder of either kind."""
    rng = random.Random(choose(SEEDS))
    kind = rng.choice(
        ["sample", "sample", "unclip", "unclip", "dvae", "compress", "rank", "toybox"]
    )
    source = world.unclip if kind == "unclip" else world.model
    model = world.copy(source, scratch / "in" / "model")
    spoil(model, world, rng)
    on = ["--device", "cpu", "--out", str(scratch / "out")]
    images, name = str(world.images), str(model)
    few = ["--num-candidates", "2", "--num-images", "1"]
    return {
        "sample": ["sample", "a red cube", "--model", name, *few, *on],
        "unclip": ["sample", "a cube", "--model", name, *few, "--steps", "2", "--prior-steps", "2",
                   *on],
        "dvae": ["evaluate", "dvae", "--model", name, "--data", images, "--precision", "fp32", *on],
        "compress": ["compress", images, "--model", name, *on[:-1], str(scratch / "out" / "a.d1c")],
        "rank": ["rank", "a red cube", images, "--clip", name + "/clip", *on],
        "toybox": ["evaluate", "toybox", "--model", name, "--classifier",
                   str(model / "classifier.safetensors"), "--num-prompts", "1", "--best-of", "1",
                   *on],
    }[kind]  # fmt: skip


def checkpoints(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Resume from, sample with, or fit a scaling law to a damaged checkpoint."""
    rng = random.Random(choose(SEEDS))
    kind = rng.choice(["resume", "resume", "sample", "scaling"])
    where = "out" if kind == "resume" else "in/training"
    run = world.copy(world.training, scratch / where)
    spoil(run, world, rng)
    if rng.random() < 0.3 and (state := run / "step-2" / "state.pt").is_file():
        state.unlink()
        torch.save(changed({"step": 2, "resume_key": {}, "data_state": {}}, rng), state)
    on = ["--device", "cpu", "--out", str(scratch / "out")]
    if kind == "resume":
        return [*world.training_command(world.codes), "--steps", "3", "--out", str(run)]
    if kind == "sample":
        return ["sample", "a cube", "--model", str(run), "--num-images", "1", *on]
    return ["fit-scaling", str(run), str(world.training), "--out", str(scratch / "out")]


def parts(archive: bytes) -> tuple[bytes, dict[str, Any], bytes]:
    """Return a compressed file's magic and version, its header, and the rest up to the CRC-32."""
    head = struct.unpack_from("<I", archive, 4)[0]
    return archive[:4], json.loads(zlib.decompress(archive[8 : 8 + head])), archive[8 + head : -4]


def joined(begin: bytes, header: dict[str, Any], rest: bytes) -> bytes:
    """Return a compressed file of such parts, without its CRC-32."""
    packed = zlib.compress(json.dumps(header).encode())
    return begin + struct.pack("<I", len(packed)) + packed + rest


def summed(content: bytes) -> bytes:
    """Return a compressed file with its CRC-32."""
    return content + struct.pack("<I", zlib.crc32(content))


def archives(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Decompress damaged files, most of them with checksums that fit."""
    rng = random.Random(choose(SEEDS))
    content = world.archives[rng.choice(sorted(world.archives))]
    if rng.random() < 0.5:
        begin, header, rest = parts(content)
        if rng.random() < 0.7:
            header[rng.choice([*header, "x"])] = rng.choice(VALUES)
        content = joined(begin, header, damaged(rest, rng))
    else:
        content = damaged(content[:-4], rng)
    if rng.random() < 0.85:
        content = summed(content)
    path = scratch / "in" / "a.d1c"
    path.write_bytes(content)
    model = ["--model", str(world.model), "--device", "cpu"]
    return ["decompress", str(path), *model, "--out", str(scratch / "out")]


def changed(content: Any, rng: random.Random) -> Any:
    """Return nested containers of tensors with one value changed."""
    if isinstance(content, dict) and content:
        key = rng.choice(sorted(content, key=str))
        how = rng.random()
        if how < 0.08:
            return {name: value for name, value in content.items() if name != key}
        if how < 0.12:
            return {**content, f"{key}x": content[key]}
        return {**content, key: changed(content[key], rng)}
    if isinstance(content, torch.Tensor):
        ways = (
            lambda x: x[:-1] if x.ndim and len(x) > 1 else x[None],
            lambda x: torch.cat([x, x]) if x.ndim else x.repeat(3),
            lambda x: x[None],
            lambda x: x.flatten(),
            lambda x: x.to(torch.int64),
            lambda x: x.to(torch.complex64),
            lambda x: x.bool(),
            lambda x: x.double(),
            lambda x: x.half() * float("nan"),
            lambda x: x[:0] if x.ndim else x.reshape(1)[:0],
            lambda x: x.new_zeros(()).expand(1 << 14, 1 << 14),
            lambda x: x.to_sparse() if x.ndim else x,
            lambda x: 3,
            lambda x: None,
        )
        return rng.choice(ways)(content)
    return rng.choice(VALUES)


def foreign(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Import damaged checkpoints: bytes, containers, tensors and vocabularies."""
    rng = random.Random(choose(SEEDS))
    name = rng.choice(sorted(world.foreign))
    files = [world.copy(file, scratch / "in" / file.name) for file in world.foreign[name]]
    all_files = [path for path in sorted((scratch / "in").rglob("*")) if path.is_file()]
    path = rng.choice(all_files)
    if path.suffix in (".ckpt", ".bin", ".pt") and rng.random() < 0.75:
        content = changed(torch.load(path, weights_only=True), rng)
        torch.save(changed(content, rng) if rng.random() < 0.2 else content, path)
    else:
        path.write_bytes(damaged(path.read_bytes(), rng))
    heads = {"import vqgan": [], "import mindalle": ["--heads", "2"]}
    flags = heads.get(name, ["--heads", "2"] if "ru" in name else [])
    return [*name.split(), *map(str, files), *flags, "--out", str(scratch / "out")]
