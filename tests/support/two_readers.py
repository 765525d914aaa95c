"""What tests/test_damage.py starts in two processes: a training on images of which some are bad.

Prints one JSON object: what this process skipped, and what the main process sent.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from function_task import FunctionTask
from torch import Tensor, nn

from dalle1.data import ReadOptions, Sample, first_captions, open_source
from dalle1.training import distributed
from dalle1.training.config import TrainConfig
from dalle1.training.loop import fit, train_loader


@dataclass(frozen=True)
class Bright:
    total: Tensor


def mean(sample: Sample, rng: random.Random) -> Mapping[str, Tensor]:
    assert sample.caption(rng)
    return {"x": torch.tensor(sample.image().getpixel((0, 0))) / 255}


def bright(model: nn.Module, batch: Any, step: int, noise: torch.Generator) -> Bright:
    """Be no number in the second update."""
    return Bright(model(batch["x"]).square().mean() * (torch.nan if step == 1 else 1))


def train(data: str, out: Path, steps: int) -> dict[str, int]:
    settings: dict[str, Any] = {"batch_size": 8, "num_workers": 0, "max_bad_fraction": 1}
    settings |= {"log_every": 1, "save_every": 3, "schedule_steps": 6, "precision": "fp32"}
    config = TrainConfig(out=out, steps=steps, device="cpu", **settings)
    torch.manual_seed(0)
    task = FunctionTask(nn.Linear(3, 1), bright)
    source = open_source(data, options=ReadOptions(cleaning=config))
    task.loader = loader = train_loader(source, mean, config)
    fit(task, config)
    return dict(loader.config.stats.counts)


def only_main(fails: bool) -> Any:
    """Make something; in other processes than the main one this is never called."""
    assert distributed.is_main()
    if fails:
        raise ValueError("nothing is usable")
    return {"made": torch.arange(3)}


def main(data: str, out: Path) -> None:
    distributed.init("cpu")
    report: dict[str, Any] = {"skipped": train(data, out / "whole", 6)}
    train(data, out / "cut", 3)
    train(data, out / "cut", 6)
    report["made"] = distributed.broadcast_from_main(lambda: only_main(False))["made"].tolist()
    try:
        distributed.broadcast_from_main(lambda: only_main(True))
    except ValueError as error:
        report["error"] = str(error)
    captions = distributed.broadcast_from_main(lambda: first_captions(open_source(data), 3))
    print(json.dumps({**report, "captions": captions}))
    distributed.end_process()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
