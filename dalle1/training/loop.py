"""The training loop of every task.

A training is a pure function of its config: batches, noise and dropout follow from (seed, step), so
that an interrupted training resumes to the last digit.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial

import torch
from tqdm import tqdm

from dalle1.data.loader import Loader, LoaderConfig, Prepare
from dalle1.data.skipped import SkipStats
from dalle1.data.sources.base import Source
from dalle1.training import distributed
from dalle1.training.config import TrainConfig, resolve_precision
from dalle1.training.interrupts import NonFiniteGuard, stop_on_signal
from dalle1.training.logging import Progress, open_recorders, samples_path, throughput
from dalle1.training.task import Model, Task
from dalle1.training.trainer import Trainer


def train_loader(source: Source, prepare: Prepare, config: TrainConfig) -> Loader:
    """Return the loader of this process's parts of the batches.

    Args:
        prepare: (sample, rng) → the tensors of one example. Spawned workers unpickle it, so it
            should hold no model.
    """
    rank = distributed.rank()
    name = f"skipped-{rank}.jsonl" if rank else "skipped.jsonl"
    share = LoaderConfig(
        batch_size=config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        rank=rank,
        world_size=distributed.world_size(),
        stats=SkipStats(config.max_bad_fraction, config.out / name, report=tqdm.write),
    )
    return source.loader(prepare, share)


def fit(task: Task[Model], config: TrainConfig) -> Model:
    """Train the task's model to `config.steps`; return it with its averaged parameters.

    All processes call this, each with its own parts of the batches; only the main one writes.
    """
    config = resolve_precision(config, next(task.model.parameters()).device)
    out = config.out if distributed.is_main() else None
    with stop_on_signal() as signals:
        trainer = Trainer(task, config)
        trainer.resume()
        recorders = open_recorders(config, trainer.step) if out else []
        progress = Progress(out, trainer.step, config.steps, config.batch_size, recorders)
        guard = NonFiniteGuard(config.out, trainer.counts)
        rates = partial(throughput, config, trainer.device, task.cost)
        with progress, closing(task.loader.batches(trainer.step)) as stream:
            if _due(trainer.step, config) and not distributed.any_rank(progress.has(trainer.step)):
                progress.report(trainer.step, validate(trainer))  # a signal or crash came first
            while trainer.step < config.steps:
                batch = next(stream)
                progress.advance()
                values = trainer.update(batch)
                step, stopped = trainer.step, distributed.any_rank(bool(signals))
                guard.update(step, values, trainer.may_overflow)
                last = step == config.steps or stopped
                if step % config.log_every == 0 or last:
                    progress.log(step, {**values, **trainer.global_counts()}, rates)
                if step % config.save_every == 0 or last:
                    trainer.save()
                if stopped:
                    progress.stopped(step)
                    distributed.barrier()
                    raise SystemExit(0)
                if _due(step, config):
                    progress.report(step, validate(trainer))
    return trainer.finish()


def _due(step: int, config: TrainConfig) -> bool:
    """Whether the model of this step is to be validated."""
    return step > 0 and (step % config.validate_every == 0 or step == config.steps)


@torch.no_grad()
def validate(trainer: Trainer[Model]) -> dict[str, float]:
    """Validate the averaged and the raw parameters, and write samples of the averaged ones.

    Returns: the task's numbers, those of the raw parameters as raw_NAME; {} in a process that takes
        no part.
    """
    engine, task = trainer.engine, trainer.task
    path = samples_path(trainer.config.out, trainer.step)
    takes_part = distributed.is_main() or engine.collective_eval

    def numbers() -> dict[str, float]:
        return engine.evaluate(lambda model: dict(task.validate(model))) if takes_part else {}

    with engine.ema_weights():
        averaged = numbers()
        if distributed.is_main() and not engine.collective_eval:
            engine.evaluate(lambda model: task.sample(model, path))
    if distributed.is_main() and engine.collective_eval:
        with trainer.saved_model() as model:
            if model is not None:
                task.sample(model, path)
    raw = {f"raw_{name}": value for name, value in numbers().items()}
    distributed.barrier()
    return {**averaged, **raw}
