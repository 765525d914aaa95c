"""The training loop of all three stages. It names no model: it takes a loss function.

A run is a pure function of its config: batches, noise and dropout are drawn from (seed, step), so
a run that was interrupted goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dalle1.data.cleaning import CleaningConfig
from dalle1.data.loader import Prepare, Source, batches
from dalle1.data.skipped import SkipStats
from dalle1.devices import matmul_flops_per_second, peak_memory
from dalle1.training import distributed
from dalle1.training.interrupts import NonFiniteGuard, stop_on_signal
from dalle1.training.logging import Progress
from dalle1.training.recorders import Recorder, TensorBoard, WeightsAndBiases
from dalle1.training.schedules import warmup_cosine
from dalle1.training.trainer import LossFunction, Model, Scales, Trainer, recipe


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CleaningConfig):
    """What every training takes."""

    out: Path
    """Folder to write to. A training that was interrupted there goes on where it stopped."""
    data: str = "toybox"
    """Where pairs come from: `toybox` (endless), `toybox:N` (its first N scenes), a folder of
    pictures with captions, or a folder, glob or {000..123} pattern of WebDataset shards, also
    behind pipe:COMMAND, http(s):// or s3://. Several, with weights: a::2,b::1."""
    steps: int = 10_000
    """Updates in all."""
    allow_upscale: bool = False
    """Enlarge pictures that are smaller than the model's input; else they are left out, counted."""
    batch_size: int = 32
    """Pictures (or pairs) an update."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after another, to fit a small memory; a divisor of it.
    What compares the samples of a batch (the dVAE's usage weight, the contrastive loss) then
    compares those of a part."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW; or, for the matrices of the layers, Muon (Jordan et al. 2024), which learns more from
    few samples, and AdamW for the rest. Paper: adamw."""
    learning_rate: float = 1e-3
    """The highest step size, reached after the warm-up."""
    final_learning_rate: float = 1e-5
    """Step size at the end of the cosine, and from there on."""
    schedule_steps: int | None = None
    """Updates, warm-up included, at which the cosine ends. None: at `steps`."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """After the warm-up, the cosine; or constant, and halved at plateaus of the training loss."""
    plateau_window: int = 5_000
    """Updates whose mean losses are compared to find a plateau."""
    warmup_steps: int = 100
    """Updates over which the step size rises linearly."""
    weight_decay: float = 1e-4
    """Decoupled decay of the weights that `decays` names."""
    decays: Literal["matrices", "weights", "all"] = "weights"
    """matrices; or weights, which are embeddings, too; or all, which is gains and biases, too."""
    beta2: float = 0.999
    """AdamW's second β; the first is 0.9."""
    variance_clip: float | None = None
    """Upper limit of AdamW's estimate of each weight's variance."""
    clip_norm: float = 4.0
    """Largest global norm of the gradient."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are those that are saved for use."""
    ema_every: int = 1
    """Updates between two steps of that average."""
    seed: int = 0
    """Of the initial weights, the batches and all noise."""
    device: str = "auto"
    """auto is cuda, else mps, else cpu."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """What matrix products and convolutions are computed in; weights stay fp32. fp16, for cards
    without bf16, scales gradients."""
    num_workers: int = 1
    """Processes that prepare batches; 0 prepares them in the main one."""
    log_every: int = 50
    """Steps between lines of log.jsonl."""
    validate_every: int = 500
    """Steps between validations and sample pictures."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 1
    """How many checkpoints stay, the latest."""
    zero: Literal[0, 1, 2, 3] = 0
    """What processes share out, by DeepSpeed: 1 AdamW's state, 2 gradients, too, 3 weights, too. 0:
    each has everything, in plain torch. Start several by torchrun, deepspeed or Slurm."""
    offload: Literal["none", "cpu"] = "none"
    """Where zero's shares of AdamW's state (3: and of the weights) are kept."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What zero computes with: bf16 ones take half the memory; their shares stay fp32."""
    deepspeed: Path | None = None
    """A config of DeepSpeed of your own, JSON, instead of zero, offload and weights."""
    tensorboard: bool = False
    """Log to OUT/tensorboard, too (`pip install tensorboard`)."""
    wandb: str | None = None
    """Log to this project of Weights & Biases, too (`pip install wandb`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        intervals = ("log_every", "validate_every", "save_every")
        for name in ("steps", "batch_size", "accumulate", *intervals, "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}, expected a divisor of batch_size, "
                f"{self.batch_size}"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}, expected 0 to {(1 << 32) - 1}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected a number in [0, 1)")
        choices = {
            "optimizer": ("adamw", "muon"),
            "precision": ("bf16", "fp16", "fp32"),
            "schedule": ("cosine", "plateau"),
            "decays": ("matrices", "weights", "all"),
            "zero": (0, 1, 2, 3),
            "offload": ("none", "cpu"),
            "weights": ("fp32", "bf16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = " or ".join(map(str, allowed))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        if self.optimizer == "muon" and (self.zero or self.deepspeed is not None):
            raise ValueError(
                "optimizer is muon, which needs whole matrices, and ZeRO shares them out; give "
                "--optimizer adamw, or leave out --zero and --deepspeed"
            )
        self._check_engine()

    def _check_engine(self) -> None:
        """Refuse settings of the engine that would be ignored."""
        if self.deepspeed is not None and (self.zero or self.weights != "fp32"):
            raise ValueError("--deepspeed FILE says it all: leave out --zero and --weights")
        if self.offload != "none" and not self.zero:
            raise ValueError("--offload cpu needs --zero 1, 2 or 3; a --deepspeed FILE has its own")
        if self.weights == "bf16" and (not self.zero or self.precision != "bf16"):
            raise ValueError("--weights bf16 needs --zero 1, 2 or 3 and --precision bf16")
        if self.precision == "fp16" and (self.zero or self.deepspeed is not None):
            raise ValueError(
                "--precision fp16 scales gradients layer by layer, which --zero 1, 2, 3 and "
                "--deepspeed take apart; use --precision bf16, or --zero 0"
            )

    def learning_rate_at(self, step: int) -> float:
        """Give the step size of an update, before it is halved at any plateau."""
        return warmup_cosine(
            step,
            peak=self.learning_rate,
            end=self.final_learning_rate if self.schedule == "cosine" else self.learning_rate,
            warmup=self.warmup_steps,
            duration=self.schedule_steps or self.steps,
        )


def stream_from(
    source: Source, prepare: Prepare, config: TrainConfig
) -> Callable[..., Generator[dict[str, Any]]]:
    """Give what `fit` reads from: (step, place of the last batch) → this process's parts.

    Args:
        prepare: (source, index, rng) → the tensors of one example. Workers that are spawned
            unpickle it, so it should hold no more than it needs, and no model.
    """
    rank = distributed.rank()
    name = f"left-out-{rank}.jsonl" if rank else "left-out.jsonl"
    return partial(
        batches,
        source,
        prepare,
        batch_size=config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        rank=rank,
        world_size=distributed.world_size(),
        tally=SkipStats(config.max_bad_fraction, config.out / name, say=tqdm.write),
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one sample costs, so that a training can say how well it uses the machine."""

    tokens: int
    """Places of its stream."""
    operations: float
    """Multiplications and additions of its forward and backward pass."""


def recorders(config: TrainConfig, start: int) -> list[Recorder]:
    """Open what `config` asks for beside log.jsonl."""
    found: list[Recorder] = []
    if config.tensorboard:
        found.append(TensorBoard(config.out, start))
    if config.wandb:
        config.out.mkdir(parents=True, exist_ok=True)
        found.append(WeightsAndBiases(config.wandb, config.out, recipe(config)))
    return found


def efficiency(
    config: TrainConfig, device: torch.device, work: Work | None, rate: float
) -> dict[str, float]:
    """Tell what `rate` samples a second mean for the machine."""
    numbers = {"memory_gib": peak_memory(device)}
    if work is not None:
        numbers["tokens_per_second"] = rate * work.tokens
        reached = rate * work.operations / distributed.world_size()
        numbers["utilisation"] = reached / _matrix_rate(device, config.precision)
    return numbers


_matrix_rate = cache(matmul_flops_per_second)


def fit(
    model: Model,
    loss_fn: LossFunction[Model],
    batches: Callable[..., Generator[dict[str, Any]]],
    config: TrainConfig,
    *,
    save_model: Callable[[Model, Path], None],
    validate: Callable[[Model, int], Mapping[str, float]] | None = None,
    measure: Callable[[Model], Mapping[str, float]] | None = None,
    draw: Callable[[Model, int], None] | None = None,
    scales: Scales | None = None,
    work: Work | None = None,
    init: Path | None = None,
) -> Model:
    """Train `model` to `config.steps` and give it with the average of its weights.

    Every process calls this, with its own parts of the batches; only the main one writes.

    Args:
        loss_fn: see `LossFunction`; its mean over equal parts of a batch is the batch's.
        batches: (start, a step; and place, what the last batch had under `PLACE`, if it had) →
            the batches from there on, on any device.
        save_model: writes a model's files into a folder.
        validate: (averaged model, step) → numbers for the log.
        measure: (the model as it is trained) → numbers, which go by raw_NAME.
        draw: (averaged model, step) draws pictures for OUT/samples; in the main process, with all
            of the weights.
        scales: of the gradients, for fp16; one for the whole loss if not given.
        work: what a sample costs, to be told in the log as a share of the machine's speed.
        init: safetensors file of weights to begin with, instead of the model's.
    """
    here = config.out if distributed.is_main() else None
    with stop_on_signal() as caught:
        trainer = Trainer(model.train(), config, scales)
        trainer.resume(init)
        others = recorders(config, trainer.step) if here else []
        progress = Progress(here, trainer.step, config.steps, config.batch_size, others)
        skipped = NonFiniteGuard(config.out, trainer.counts)
        measured = partial(_measured, trainer, validate, measure, draw)
        rates = partial(efficiency, config, trainer.device, work)
        with progress, closing(_updates(trainer, loss_fn, batches, progress)) as updates:
            if _due(trainer.step, config) and not distributed.any_rank(progress.has(trainer.step)):
                progress.report(trainer.step, measured())  # a signal or a crash came before it
            for values in updates:
                step, stopped = trainer.step, distributed.any_rank(bool(caught))
                skipped.update(step, values, trainer.scaled)
                last = step == config.steps or stopped
                if step % config.log_every == 0 or last:
                    progress.log(step, {**values, **trainer.counted()}, rates)
                if step % config.save_every == 0 or last:
                    trainer.save(save_model)
                if stopped:
                    progress.stopped(step)
                    distributed.barrier()
                    raise SystemExit(0)
                if _due(step, config):
                    progress.report(step, measured())
    return trainer.finished()


def _updates(
    trainer: Trainer[Model],
    loss_fn: LossFunction[Model],
    batches: Callable[..., Generator[dict[str, Any]]],
    progress: Progress,
) -> Generator[dict[str, float | Tensor]]:
    """Make update after update, from where the trainer is; give what each one gave."""
    if trainer.step >= trainer.config.steps:
        return
    with closing(batches(**trainer.where())) as stream:
        for batch in stream:
            progress.advance()
            trainer.take_notes(batch)
            batch = {name: tensor.to(trainer.device) for name, tensor in batch.items()}
            yield trainer.update(loss_fn, batch)
            if trainer.step == trainer.config.steps:
                return


def _due(step: int, config: TrainConfig) -> bool:
    """Say whether the model of this step is to be measured."""
    return step > 0 and (step % config.validate_every == 0 or step == config.steps)


def _measured(
    trainer: Trainer[Model],
    validate: Callable[[Model, int], Mapping[str, float]] | None,
    measure: Callable[[Model], Mapping[str, float]] | None,
    draw: Callable[[Model, int], None] | None,
) -> dict[str, float]:
    """Measure and show the averaged model, and the raw one; {} where a process takes no part."""
    numbers: dict[str, float] = {}
    engine, step = trainer.engine, trainer.step
    takes_part = distributed.is_main() or engine.together
    if validate is not None or draw is not None:
        with engine.averaged() as model:
            if validate is not None and takes_part:
                numbers.update(engine.apply(lambda model: validate(model, step)))
            if draw is not None and distributed.is_main() and not engine.together:
                draw(model, step)
    if draw is not None and distributed.is_main() and engine.together:
        with trainer.saved() as whole:
            if whole is not None:
                draw(whole, step)
    if measure is not None and takes_part:
        engine.model.eval()
        raw = engine.apply(measure)
        engine.model.train()
        numbers.update({f"raw_{name}": value for name, value in raw.items()})
    distributed.barrier()
    return numbers
