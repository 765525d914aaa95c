"""Measure the memory of a training, of writing a checkpoint and of loading a model.

    python benchmarks/memory.py training --batch-size 8   # beside what dalle1.planner says
    python benchmarks/memory.py checkpoint                # beyond what the training holds
    python benchmarks/memory.py loading                   # the peak, beside the weights
    python benchmarks/memory.py sampling                  # the same, until an image is sampled

On a GPU what torch allocates there counts, else what is resident of the process: with --device cpu,
on Linux, what is freed goes back at once, so that the peak is that of the tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dalle1.devices import pick_device
from dalle1.model.transformer import Transformer, TransformerConfig, TransformerLoss
from dalle1.planner import Plan, memory
from dalle1.sampling import packed_linear
from dalle1.sampling.decoding import generate, null_caption
from dalle1.tasks.transformer import TRANSFORMER_PRESETS
from dalle1.training import resblocks
from dalle1.training.config import TrainConfig
from dalle1.training.engines.ddp import DDPEngine
from dalle1.training.task import Task

MIB = 2**20
TINY = TransformerConfig(
    text_vocab=10, text_len=4, grid_size=4, width=16, depth=4, heads=2, codebook_size=8
)


class Peak:
    """The most bytes that are held from when it is made on, beyond what is held then."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            libc = ctypes.CDLL("libc.so.6")
            for parameter in (-3, -1):  # map and trim from 64 KiB on
                libc.mallopt(parameter, 1 << 16)
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self.most()

    def most(self) -> int:
        """Return the high-water mark in bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def grown(self) -> int:
        """Return its increase in bytes."""
        return self.most() - self.before


class TransformerTask(Task[Transformer]):
    """The losses of a transformer, without data."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def losses(self, batch: Mapping[str, Tensor], *_: object) -> list[TransformerLoss]:
        return [self.model.loss(**batch)]


def engine_of(size: TransformerConfig, options: argparse.Namespace) -> DDPEngine[Transformer]:
    """Make two updates of a training of that size."""
    device, batch = pick_device(options.device), options.batch_size
    model = Transformer(size).to(device)
    resblocks.prepare(model, checkpointing=options.checkpointing)
    config = TrainConfig(out=Path("out"), precision=options.precision, batch_size=batch)
    engine = DDPEngine(TransformerTask(model), config)
    for _ in range(2):
        text = torch.zeros(batch, size.text_len, dtype=torch.long, device=device)
        codes = torch.zeros(batch, size.image_len, dtype=torch.long, device=device)
        batch_of_zeros = {"text": text, "codes": codes}
        engine.backward(batch_of_zeros, 0, torch.Generator(device), last=True)
        engine.step(1e-3)
        engine.update_ema(0.5)
    return engine


def training(size: TransformerConfig, options: argparse.Namespace) -> str:
    """Compare what a step takes with what the plan says."""
    device = pick_device(options.device)
    plan = Plan(
        model=size,
        batch_size=options.batch_size,
        micro_batch=options.batch_size,
        steps=1,
        checkpointing=options.checkpointing,
        precision=options.precision,
        device=device.type,
    )
    planned = memory(plan).total
    engine_of(TINY, options)  # what the libraries need is no memory of the training
    peak = Peak(device)
    engine_of(size, options)
    ratio = planned / peak.grown()
    return f"planned {planned / MIB:.0f} MiB, measured {peak.grown() / MIB:.0f} MiB: {ratio:.3f}"


def checkpoint(size: TransformerConfig, options: argparse.Namespace) -> str:
    """Report the memory of writing a checkpoint beyond that of the training."""
    options.device = "cpu"
    engine = engine_of(size, options)
    held = sum(t.numel() * 4 for shard in engine.shards() for t in shard.tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "training.safetensors"
        peak = Peak(torch.device("cpu"))
        engine.save(path)
        written = peak.grown()
        for kind in ("ema", "weights"):
            with engine.materialize(path, kind) as model:
                model.save(folder)
    return (
        f"the training holds {held / MIB:.0f} MiB; writing it took {written / MIB:.0f} MiB more, "
        f"and the models {peak.grown() / MIB:.0f}, of which the most is the file itself, mapped"
    )


def loading(size: TransformerConfig, options: argparse.Namespace) -> str:
    """Report the peak memory of loading, and of sampling an image, relative to the weights."""
    if options.what == "sampling":
        packed_linear.LARGE = 0  # as for a model of which two do not fit
        size = replace(size, text_vocab=1024, text_len=64, codebook_size=1024)  # mostly layers
    with tempfile.TemporaryDirectory() as folder:
        Transformer(TINY).save(Path(folder) / "tiny")
        sample_one(Transformer.load(Path(folder) / "tiny"))
        Transformer(size).save(folder, options.stored)
        peak = Peak(torch.device("cpu"))
        model = Transformer.load(folder, dtype=options.dtype)
        if options.what == "sampling":
            sample_one(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ratio = peak.grown() / weights
    return f"weights {weights / MIB:.0f} MiB, peak {peak.grown() / MIB:.0f} MiB: {ratio:.3f}"


def sample_one(model: Transformer) -> None:
    """Sample the codes of one image."""
    generate(model, null_caption(model), torch.zeros(1, model.config.image_len))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["training", "checkpoint", "loading", "sampling"])
    parser.add_argument("--preset", default="toy", choices=TRANSFORMER_PRESETS)
    parser.add_argument("--grid-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cpu")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name in ("stored", "dtype"):
        parser.add_argument(f"--{name}", type=dtypes.__getitem__, default=torch.float32)
    options = parser.parse_args()
    size = TransformerConfig(**vars(TRANSFORMER_PRESETS[options.preset].model))
    size = replace(size, grid_size=options.grid_size)
    measures: dict[str, Callable[..., str]] = {
        "training": training,
        "checkpoint": checkpoint,
        "loading": loading,
        "sampling": loading,
    }
    print(measures[options.what](size, options))


if __name__ == "__main__":
    main()
