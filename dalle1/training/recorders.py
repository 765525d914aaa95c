"""Other places that a training's numbers and pictures go to, where a user asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from PIL import Image


class Recorder(Protocol):
    """Takes what log.jsonl takes, and the sample pictures."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""

    def picture(self, step: int, path: Path) -> None:
        """Record a picture file."""

    def close(self) -> None:
        """Write what is still held back."""


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard needs the package: pip install tensorboard") from error
        # What a run that died wrote past its last checkpoint is dropped, as in log.jsonl.
        self.writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self.writer.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of a project of Weights & Biases; OUT/wandb-id.txt lets it go on when resumed."""

    def __init__(self, project: str, out: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("--wandb needs the package: pip install wandb") from error
        name = out / "wandb-id.txt"
        if not name.exists():
            name.write_text(uuid4().hex)
        self.wandb = wandb
        self.run = wandb.init(
            project=project,
            dir=str(out),
            id=name.read_text(),
            resume="allow",
            config=dict(config),
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        self.run.log({"samples": self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()
