"""One update after another, on any engine, and all that must be kept to go on from there."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dalle1.data.loader import LEFT_OUT, PLACE, join_places
from dalle1.storage import model_folder
from dalle1.training import distributed
from dalle1.training.checkpoint import TENSORS_NAME, load_checkpoint, save_checkpoint
from dalle1.training.engines.base import Engine, Plain, samples_at_once
from dalle1.training.scaling import LossScale
from dalle1.training.schedules import Plateau

if TYPE_CHECKING:
    from dalle1.training.loop import TrainConfig

RAW_NAME = "raw"
"""The folder within a checkpoint with the weights as they are trained, instead of their average."""


class Loss(Protocol):
    """A dataclass of scalar tensors; `total` is minimised, the others are logged."""

    @property
    def total(self) -> Tensor: ...


Batch = Mapping[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)
LossFunction = Callable[[Model, Batch, int, torch.Generator], Loss]
"""(model, batch, step, source of noise) → a dataclass of scalars with `total`."""


class Scales(Protocol):
    """What keeps fp16's gradients in range; see `dalle1.training.scaling`."""

    def scale_loss(self, loss: Tensor) -> Tensor: ...
    def unscale(self) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    @property
    def stuck(self) -> bool: ...


FREE = (
    *("out", "device", "steps", "num_workers", "tensorboard", "wandb", "max_bad_fraction"),
    *("log_every", "validate_every", "save_every", "keep"),
    *("accumulate", "zero", "offload", "weights", "deepspeed"),
)
"""What may change when a run is resumed: none of it changes what was learned so far."""


def recipe(config: TrainConfig) -> dict[str, str]:
    """Give the settings that a resumed run must share, by name."""
    fields = (f.name for f in dataclasses.fields(config) if f.name not in FREE)
    return {name: str(getattr(config, name)) for name in fields}


def step_generator(seed: int, step: int, device: torch.device, part: int = 0) -> torch.Generator:
    """Make the source of noise of a part of a step's batch, however the run came to this step.

    Parts are counted over all processes, so that two that take a batch whole, each its half, draw
    what one draws that takes it in two parts.
    """
    number = seed * 1_000_000_007 + step + part * 0x9E3779B97F4A7C15
    return torch.Generator(device).manual_seed(number % (1 << 63))


def engine_for(model: Model, config: TrainConfig, scales: Scales | None = None) -> Engine[Model]:
    """Give `model` the engine that `config` asks for; ValueError where a batch cannot be shared."""
    samples_at_once(config)
    if config.zero or config.deepspeed is not None:
        from dalle1.training.engines.deepspeed import Zero

        return Zero(model, config)
    return Plain(model, config, scales)


class Trainer(Generic[Model]):
    """A model in its engine, at some step."""

    def __init__(self, model: Model, config: TrainConfig, scales: Scales | None = None) -> None:
        self.config = config
        self.scales = scales
        if scales is None and config.precision == "fp16":
            self.scales = LossScale(model)
        self.plateau = Plateau(config.plateau_window) if config.schedule == "plateau" else None
        self.engine = engine_for(model, config, self.scales)
        self.device = self.engine.device
        self.step = 0
        self.place: Any = None  # in the data, where it cannot be told from the step
        self.counts: Counter[str] = Counter()
        """What was left out and skipped so far, by this process's count; see `counted`."""

    def update(self, loss_fn: LossFunction[Model], batch: Batch) -> dict[str, float | Tensor]:
        """Make one update with this process's part of a batch.

        Returns: the loss's fields, averaged over processes; the gradient's norm; the step size; and
            for fp16, or where it is 0, `applied`: 1, or 0 where the gradient was not finite and the
            update skipped.
        """
        config = self.config
        rate = config.learning_rate_at(self.step)
        if self.plateau:
            rate /= 2**self.plateau.halvings
        fields = self._backward(loss_fn, batch)
        norm, made = self.engine.update(rate)
        self.step += 1
        if self.step % config.ema_every == 0:
            # Young averages follow quickly, so that the initial weights are soon forgotten.
            count = self.step // config.ema_every
            self.engine.average(min(config.ema_decay, (1 + count) / (10 + count)))
        if self.plateau and fields["total"].isfinite():
            self.plateau.update(fields["total"])
        applied = {} if made and not self.scales else {"applied": float(made)}
        return {**fields, "gradient_norm": norm, "learning_rate": rate, **applied}

    def _backward(self, loss_fn: LossFunction[Model], batch: Batch) -> dict[str, Tensor]:
        """Add up the gradients of a batch's parts; give the means of their losses' fields."""
        parts = self.config.accumulate
        cut = {name: tensor.chunk(parts) for name, tensor in batch.items()}
        sums: dict[str, Tensor] = {}
        for i in range(parts):
            part = {name: chunks[i] for name, chunks in cut.items()}
            number = distributed.rank() * parts + i
            noise = step_generator(self.config.seed, self.step, self.device, number)
            loss = self.engine.backward(partial(_call, loss_fn, part, self.step, noise), i)
            for field in dataclasses.fields(loss):  # type: ignore[arg-type]
                value = torch.as_tensor(getattr(loss, field.name), device=self.device).detach()
                sums[field.name] = sums.get(field.name, 0.0) + value.float() / parts
        means = distributed.mean(torch.stack(list(sums.values())))
        return dict(zip(sums, means.unbind(), strict=True))

    def where(self) -> dict[str, Any]:
        """Say where in the data to go on, as `dalle1.data.loader` takes it."""
        return {"start": self.step, **({"place": self.place} if self.place else {})}

    def take_notes(self, batch: dict[str, Any]) -> None:
        """Take out of a batch what is no tensor: its place in the data, and what was left out."""
        self.place = batch.pop(PLACE, None)
        self.counts.update(f"left out/{pair.cause}" for pair in batch.pop(LEFT_OUT, ()))

    def counted(self) -> dict[str, int]:
        """Add up the counts of all processes, each of which must ask for it."""
        return dict(sum(distributed.all_gather_object(self.counts), Counter()))

    @property
    def scaled(self) -> bool:
        """Whether gradients are scaled, so that now and then some overflow and all is well."""
        return self.scales is not None and not self.scales.stuck

    def save(self, save_model: Callable[[Model, Path], None]) -> None:
        """Write a checkpoint: models for use, and what resuming needs."""

        places, counts = distributed.all_gather_object(self.place), self.counted()

        def write(folder: Path) -> None:
            path = folder / TENSORS_NAME
            self.engine.save(path)
            if distributed.is_main():
                for kind, place in (("average", folder), ("weights", folder / RAW_NAME)):
                    place.mkdir(exist_ok=True)
                    with self.engine.saved(path, kind) as model:
                        save_model(model, place)

        if not distributed.is_main():
            write(Path())
            return
        state = {"recipe": recipe(self.config), "updates": self.engine.updates}
        state["place"] = join_places(places) if self.place else None
        state["counts"] = counts
        more = {name: part.state_dict() for name, part in self._more().items()}
        save_checkpoint(self.config.out, self.step, {**state, **more}, write, self.config.keep)

    def _more(self) -> dict[str, Scales | Plateau]:
        parts = {"scales": self.scales, "plateau": self.plateau}
        return {name: part for name, part in parts.items() if part is not None}

    def resume(self, init: Path | None = None) -> None:
        """Go on from the latest checkpoint, if there is one; ValueError for one of another kind.

        Args:
            init: file of the weights to begin with where there is no checkpoint.
        """
        self._resume(init)
        if len(steps := set(distributed.all_gather_object(self.step))) > 1:
            raise ValueError(
                f"processes found checkpoints of steps {', '.join(map(str, sorted(steps)))} in "
                f"{self.config.out}; it has to be one folder that all machines share"
            )

    def _resume(self, init: Path | None) -> None:
        out = self.config.out
        if (state := load_checkpoint(out)) is None:
            if init is not None:
                self.engine.begin_with(init)
            return
        now = recipe(self.config)
        # What there was no setting for may be set now, but for what had no choice then.
        then = {**now, "optimizer": "adamw", **state["recipe"]}
        changed = [f"{k} was {then[k]} and is {now[k]}" for k in now if then[k] != now[k]]
        if changed:
            raise ValueError(
                f"{out} holds a training with other settings: {'; '.join(changed)}. "
                "Give the same ones to resume it, or another --out"
            )
        try:
            self.engine.load(out / "latest" / TENSORS_NAME)
        except (ValueError, SafetensorError) as error:
            raise ValueError(
                f"{out} holds a training of another model, or a damaged one ({error}); give the "
                "same preset and sizes to resume it, or another --out"
            ) from error
        self.engine.updates = state["updates"]
        for name, part in self._more().items():
            part.load_state_dict(state[name])
        self.step, self.place = state["step"], state.get("place")
        if distributed.is_main():  # the sums go on in one process
            self.counts.update(state.get("counts", {}))
            print(f"Going on at step {self.step} of {self.config.steps} in {out}")

    @contextmanager
    def saved(self) -> Iterator[Model | None]:
        """Give the averaged model that this step's checkpoint holds; None where there is none."""
        folder = model_folder(self.config.out)
        if folder.name != f"step-{self.step}":
            yield None
            return
        with self.engine.saved(folder / TENSORS_NAME, "average") as model:
            yield model.to(self.device)

    def finished(self) -> Model:
        """Give the model with its averaged weights, for good."""
        distributed.barrier()
        self.engine.exchange()
        return self.engine.model.eval()


def _call(
    loss_fn: LossFunction[Model], batch: Batch, step: int, noise: torch.Generator, model: Model
) -> Loss:
    return loss_fn(model, batch, step, noise)
