"""Engines under the training loop: plain torch (DDP), and ZeRO by DeepSpeed."""

from __future__ import annotations

from dalle1.training import distributed
from dalle1.training.config import TrainConfig
from dalle1.training.engines.base import Engine, samples_at_once
from dalle1.training.engines.ddp import DDPEngine
from dalle1.training.engines.deepspeed import DeepSpeedEngine
from dalle1.training.task import Model, Task


def make_engine(task: Task[Model], config: TrainConfig) -> Engine[Model]:
    """Return the engine that `config` selects; ValueError where a batch cannot be split evenly."""
    samples_at_once(config)
    if config.gradient_compression != "none" and distributed.world_size() == 1:
        raise ValueError(
            "gradient_compression is powersgd, which compresses what several processes exchange, "
            "and there is one; start more with torchrun, or use --gradient-compression none"
        )
    return (DeepSpeedEngine if config.uses_deepspeed else DDPEngine)(task, config)
