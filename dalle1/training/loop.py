"""The training loop of all three stages. It names no model: it takes a loss function.

A run is a pure function of its config: batches, noise and dropout are drawn from (seed, step), so
a run that was interrupted goes on as if nothing had happened.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dalle1.data.batches import LEFT_OUT, PLACE, Prepare, Source, batches
from dalle1.data.left_out import Tally
from dalle1.data.reading import Reading
from dalle1.device import autocast, keep_freed_memory, matrix_rate, peak_memory
from dalle1.training.checkpoint import load_checkpoint, save_checkpoint
from dalle1.training.progress import Progress
from dalle1.training.recorders import Recorder, TensorBoard, WeightsAndBiases
from dalle1.training.scaling import LossScale
from dalle1.training.schedules import Plateau, warmup_cosine
from dvae.weights import model_folder


@dataclass(frozen=True, kw_only=True)
class RunConfig(Reading):
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
    learning_rate: float = 1e-3
    """AdamW's highest step size, reached after the warm-up."""
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
    tensorboard: bool = False
    """Log to OUT/tensorboard, too (`pip install tensorboard`)."""
    wandb: str | None = None
    """Log to this project of Weights & Biases, too (`pip install wandb`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("steps", "batch_size", "accumulate", "log_every", "validate_every", "save_every")
        for name in counts:
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
            "precision": ("bf16", "fp16", "fp32"),
            "schedule": ("cosine", "plateau"),
            "decays": ("matrices", "weights", "all"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = " or ".join(allowed)
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def learning_rate_at(self, step: int) -> float:
        """Give the step size of an update, before it is halved at any plateau."""
        return warmup_cosine(
            step,
            peak=self.learning_rate,
            end=self.final_learning_rate if self.schedule == "cosine" else self.learning_rate,
            warmup=self.warmup_steps,
            duration=self.schedule_steps or self.steps,
        )


class Loss(Protocol):
    """A dataclass of scalar tensors; `total` is minimised, the others are logged."""

    @property
    def total(self) -> Tensor: ...


Batch = Mapping[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)
LossFunction = Callable[[Model, Batch, int, torch.Generator], Loss]
"""(model, batch, step, source of noise) → a dataclass of scalars with `total`."""


FREE = (
    *("out", "device", "steps", "num_workers", "tensorboard", "wandb", "max_bad_fraction"),
    *("log_every", "validate_every", "save_every"),
)
"""What may change when a run is resumed: none of it changes what was learned so far."""


def recipe(config: RunConfig) -> dict[str, str]:
    """Give the settings that a resumed run must share, by name."""
    fields = (f.name for f in dataclasses.fields(config) if f.name not in FREE)
    return {name: str(getattr(config, name)) for name in fields}


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Make the source of one step's noise, the same however the run came to this step."""
    return torch.Generator(device).manual_seed(seed * 1_000_000_007 + step)


def stream_from(
    source: Source, prepare: Prepare, config: RunConfig, rank: int = 0, world_size: int = 1
) -> Callable[..., Generator[dict[str, Any]]]:
    """Give what `fit` reads from: (step, place of the last batch) → a rank's batches from there on.

    Args:
        prepare: (source, index, rng) → the tensors of one example. Workers that are spawned
            unpickle it, so it should hold no more than it needs, and no model.
    """
    name = f"left-out-{rank}.jsonl" if rank else "left-out.jsonl"
    return partial(
        batches,
        source,
        prepare,
        batch_size=config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        rank=rank,
        world_size=world_size,
        tally=Tally(config.max_bad_fraction, config.out / name, say=tqdm.write),
    )


class Scales(Protocol):
    """What keeps fp16's gradients in range; see `dalle1.training.scaling`."""

    def scale_loss(self, loss: Tensor) -> Tensor: ...
    def unscale(self) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def split_by_decay(model: nn.Module, decays: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Give the parameters that decay, and the others; frozen ones are in neither."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        is_matrix = p.ndim > 1 and id(p) not in tables
        chosen = is_matrix or decays == "all" or (decays == "weights" and p.ndim > 1)
        if p.requires_grad:
            (decaying if chosen else others).append(p)
    return decaying, others


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one sample costs, so that a training can say how well it uses the machine."""

    tokens: int
    """Places of its stream."""
    operations: float
    """Multiplications and additions of its forward and backward pass."""


class Trainer(Generic[Model]):
    """A model, its optimizer and the running average of its weights, at some step."""

    def __init__(self, model: Model, config: RunConfig, scales: Scales | None = None) -> None:
        self.config = config
        self.model = model
        self.scales = scales
        if scales is None and config.precision == "fp16":
            self.scales = LossScale(model)
        self.plateau = Plateau(config.plateau_window) if config.schedule == "plateau" else None
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        decaying, others = split_by_decay(model, config.decays)
        groups: list[dict[str, Any]] = [
            {"params": decaying},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0
        self.place: Any = None  # in the data, where it cannot be told from the step

    def state(self) -> dict[str, Any]:
        """Everything that resuming needs."""
        return {
            "recipe": recipe(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "place": self.place,
            **{name: part.state_dict() for name, part in self._more().items()},
        }

    def _more(self) -> dict[str, Scales | Plateau]:
        parts = {"scales": self.scales, "plateau": self.plateau}
        return {name: part for name, part in parts.items() if part is not None}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; ValueError where that was of another recipe."""
        now = recipe(self.config)
        then = {**now, **state["recipe"]}  # what there was no setting for may be set now
        changed = [f"{k} was {then[k]} and is {now[k]}" for k in now if then[k] != now[k]]
        if changed:
            raise ValueError(
                f"{self.config.out} holds a training with other settings: {'; '.join(changed)}. "
                "Give the same ones to resume it, or another --out"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
        except RuntimeError as error:
            raise ValueError(
                f"{self.config.out} holds a training of another model; give the same preset and "
                "sizes to resume it, or another --out"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        for name, part in self._more().items():
            part.load_state_dict(state[name])
        self.step, self.place = state["step"], state.get("place")

    def update(self, loss_fn: LossFunction[Model], batch: Batch) -> dict[str, float | Tensor]:
        """Make one update; give the loss's fields, the gradient's norm and the step size."""
        config = self.config
        rate = config.learning_rate_at(self.step)
        if self.plateau:
            rate /= 2**self.plateau.halvings
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        fields = self._backward(loss_fn, batch)
        finite = self.scales.unscale() if self.scales else True
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        if finite and norm.isfinite():  # an infinite gradient would spoil every weight
            self.optimizer.step()
            self._clip_variance()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step % config.ema_every == 0:
            self._average()
        if self.plateau:
            self.plateau.update(torch.as_tensor(fields["total"]))
        if self.scales:
            fields["applied"] = float(finite)
        return {**fields, "gradient_norm": norm, "learning_rate": rate}

    @torch.no_grad()
    def _clip_variance(self) -> None:
        if self.config.variance_clip is not None:
            variances = [state["exp_avg_sq"] for state in self.optimizer.state.values()]
            torch._foreach_clamp_max_(variances, self.config.variance_clip)

    def _backward(self, loss_fn: LossFunction[Model], batch: Batch) -> dict[str, float | Tensor]:
        """Add up the gradients of a batch's parts; give the means of their losses' fields."""
        parts = self.config.accumulate
        device = next(self.model.parameters()).device
        generator = step_generator(self.config.seed, self.step, device)
        cut = {name: tensor.chunk(parts) for name, tensor in batch.items()}
        means: dict[str, float | Tensor] = {}
        for i in range(parts):
            part = {name: chunks[i] for name, chunks in cut.items()}
            with autocast(device, self.config.precision):
                loss = loss_fn(self.model, part, self.step, generator)
            total = loss.total / parts
            (self.scales.scale_loss(total) if self.scales else total).backward()
            for field in dataclasses.fields(loss):  # type: ignore[arg-type]
                value = torch.as_tensor(getattr(loss, field.name)).detach() / parts
                means[field.name] = means.get(field.name, 0.0) + value
        return means

    @torch.no_grad()
    def _average(self) -> None:
        # Young averages follow quickly, so that the initial weights are soon forgotten.
        count = self.step // self.config.ema_every
        decay = min(self.config.ema_decay, (1 + count) / (10 + count))
        averages, weights = ([p.data for p in m.parameters()] for m in (self.ema, self.model))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for kept, buffer in zip(self.ema.buffers(), self.model.buffers()):
            kept.copy_(buffer)  # BatchNorm's statistics are averages already


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them, so that the step can be finished."""
    caught, signals = list[int](), (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, lambda number, _: caught.append(number)) for s in signals]
    try:
        yield caught
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)


def recorders(config: RunConfig, start: int) -> list[Recorder]:
    """Open what `config` asks for beside log.jsonl."""
    found: list[Recorder] = []
    if config.tensorboard:
        found.append(TensorBoard(config.out, start))
    if config.wandb:
        config.out.mkdir(parents=True, exist_ok=True)
        found.append(WeightsAndBiases(config.wandb, config.out, recipe(config)))
    return found


def efficiency(
    config: RunConfig, device: torch.device, work: Work | None, rate: float
) -> dict[str, float]:
    """Tell what `rate` samples a second mean for the machine."""
    numbers = {"memory_gib": peak_memory(device)}
    if work is not None:
        numbers["tokens_per_second"] = rate * work.tokens
        numbers["utilisation"] = rate * work.operations / _matrix_rate(device, config.precision)
    return numbers


_matrix_rate = cache(matrix_rate)


def refuse_divergence(out: Path, step: int, values: Mapping[str, float | Tensor]) -> None:
    """Stop a run that yields no numbers any more, before its checkpoint is written over."""
    # Where fp16 overflows, the update was skipped, and the gradient says nothing.
    names = ("total", "gradient_norm") if float(values.get("applied", 1.0)) else ("total",)
    for name in names:
        if not math.isfinite(float(values[name])):
            raise ValueError(
                f"{'the loss' if name == 'total' else name} is {float(values[name])} at step "
                f"{step}; lower --learning-rate or --clip-norm. The last checkpoint is "
                f"{model_folder(out)}"
            )


def fit(
    model: Model,
    loss_fn: LossFunction[Model],
    batches: Callable[..., Generator[dict[str, Any]]],
    config: RunConfig,
    *,
    save_model: Callable[[Model, Path], None],
    validate: Callable[[Model, Model, int], Mapping[str, float]] | None = None,
    scales: Scales | None = None,
    work: Work | None = None,
) -> Model:
    """Train `model` to `config.steps` and give the average of its weights.

    Args:
        loss_fn: see `LossFunction`; its mean over equal parts of a batch is the batch's.
        batches: (start, a step; and place, what the last batch had under `PLACE`, if it had) →
            the batches from there on, on any device.
        save_model: writes the averaged model's files into a folder.
        validate: (averaged model, model, step) → numbers for the log.
        scales: of the gradients, for fp16; one for the whole loss if not given.
        work: what a sample costs, to be told in the log as a share of the machine's speed.
    """
    device = next(model.parameters()).device
    keep_freed_memory()
    trainer = Trainer(model.train(), config, scales)
    if (state := load_checkpoint(config.out)) is not None:
        trainer.load(state)
        print(f"Going on at step {trainer.step} of {config.steps} in {config.out}")
    if trainer.step >= config.steps:
        return trainer.ema
    progress = Progress(
        config.out, trainer.step, config.steps, config.batch_size, recorders(config, trainer.step)
    )
    where = {"start": trainer.step, **({"place": trainer.place} if trainer.place else {})}
    with stop_on_signal() as stopped, progress, closing(batches(**where)) as stream:
        for batch in stream:
            progress.advance(batch.pop(LEFT_OUT, ()))
            trainer.place = batch.pop(PLACE, None)
            values = trainer.update(loss_fn, {k: v.to(device) for k, v in batch.items()})
            step, last = trainer.step, trainer.step == config.steps or bool(stopped)
            if step % config.log_every == 0 or step % config.save_every == 0 or last:
                refuse_divergence(config.out, step, values)
                progress.log(step, values, lambda rate: efficiency(config, device, work, rate))
            if step % config.save_every == 0 or last:
                state = trainer.state()
                save_checkpoint(config.out, step, state, lambda f: save_model(trainer.ema, f))
            if validate and not stopped and (step % config.validate_every == 0 or last):
                progress.report(step, validate(trainer.ema, trainer.model, step))
            if last:
                break
    if stopped:
        print(f"Stopped at step {trainer.step}, saved in {config.out}; the same command goes on")
        raise SystemExit(0)
    return trainer.ema
