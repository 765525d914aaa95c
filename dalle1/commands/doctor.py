"""Report versions, hardware and whether a model samples, in a form for a bug report.

dalle1 doctor
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from dalle1.console import one_line_errors, parse

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "dalle1",
    "torch",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "transformers",
    "webdataset",
    "deepspeed",
)
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "WORLD_SIZE",
)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Options of `dalle1 doctor`."""

    model: str | None = None
    """Name or folder of the model to sample one image with; the bundled model by default."""
    device: str = "auto"
    """Device of the model: auto, cpu, cuda, cuda:1, ..."""
    sample: bool = True
    """Whether to sample an image, which takes some seconds."""


def report(config: DoctorConfig) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of each fact; sampling comes last.

    Raises: what loading the model or sampling raises.
    """
    import torch

    from dalle1.devices import free_memory, pick_device, pick_precision

    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    device = pick_device(config.device)
    yield "device", f"{device}, {_hardware(device)}"
    precision = str(pick_precision("auto", device)).removeprefix("torch.")
    yield "precision", f"{precision} where --precision is auto"
    yield "processors", f"{_processors()} available, {torch.get_num_threads()} threads of torch"
    yield "free memory", f"{free_memory(device) / 2**30:.1f} GiB"
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "environment", ", ".join(found) or "none of the variables that matter is set"
    if config.sample:
        yield "sampling", _sampling(config)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _processors() -> int:
    """Return the number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _hardware(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        name = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _sampling(config: DoctorConfig) -> str:
    """Sample one image, and return how long each part took."""
    from dalle1 import DallE

    start = time.perf_counter()
    model = DallE.from_pretrained(config.model, device=config.device, precision="auto")
    loaded = time.perf_counter()
    image = model.candidates("an avocado armchair", num_candidates=1)[0].image
    sampled = time.perf_counter()
    return (
        f"one image of {image.width} × {image.height} pixels in {sampled - loaded:.1f} s, after "
        f"loading the model in {loaded - start:.1f} s"
    )


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(DoctorConfig, args, __doc__.splitlines()[0])
        for name, value in report(config):
            print(f"{name:12} {value}", flush=True)
