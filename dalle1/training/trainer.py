"""One update after another, on any engine, and the state that resuming needs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic

import torch
from safetensors import SafetensorError
from torch import Tensor

from dalle1.data.loader import Batch, merge_states
from dalle1.training import distributed
from dalle1.training.checkpoint import TENSORS_NAME, Checkpoint, save_checkpoint
from dalle1.training.config import TrainConfig
from dalle1.training.engines import make_engine
from dalle1.training.resume_key import changed_data, changed_settings, resume_key
from dalle1.training.scaling import GradientScaler
from dalle1.training.schedules import Plateau
from dalle1.training.shared_folder import shared_checkpoint
from dalle1.training.task import Loss, Model, Task

RAW_NAME = "raw"
"""Folder in a checkpoint with the model as it is trained, instead of its average."""


class Trainer(Generic[Model]):
    """A task's model in its engine, at some step."""

    def __init__(self, task: Task[Model], config: TrainConfig) -> None:
        self.task, self.config = task, config
        self.engine = make_engine(task, config)
        self.scaler, self.device = self.engine.scaler, self.engine.device
        self.plateau = Plateau(config.plateau_window) if config.schedule == "plateau" else None
        self.step = 0
        self.counts: Counter[str] = Counter()
        """Skipped samples and updates, as this process counts them; see `global_counts`."""

    def update(self, batch: Batch) -> dict[str, float | Tensor]:
        """Make one update with this process's part of a batch.

        Returns: the losses' fields, averaged over processes; the gradient's norm; the learning
            rate; and, for fp16 or where it is 0, `applied`: 1, or 0 where the gradient was not
            finite and the update skipped.
        """
        config, parts, step = self.config, self.config.accumulate, self.step
        lr = config.lr_at(step) / 2 ** (self.plateau.halvings if self.plateau else 0)
        chunks = {name: t.to(self.device).chunk(parts) for name, t in batch.tensors.items()}
        sums: dict[str, Tensor] = {}
        for i in range(parts):
            part = {name: tensors[i] for name, tensors in chunks.items()}
            rng = step_rng(config.seed, step, self.device, distributed.rank() * parts + i)
            losses = self.engine.backward(part, step, rng, last=i == parts - 1)
            add_fields(sums, losses, parts, self.device)
        norm, stepped = self.engine.step(lr)
        self.step += 1
        if self.step % config.ema_every == 0:
            # A young average follows quickly, so that the initial parameters are soon forgotten.
            count = self.step // config.ema_every
            self.engine.update_ema(min(config.ema_decay, (1 + count) / (10 + count)))

        means = distributed.mean(torch.stack(list(sums.values())))
        values = dict(zip(sums, means.unbind(), strict=True))
        if self.plateau and values["total"].isfinite():
            self.plateau.update(values["total"])
        for sample in batch.skipped:
            self.counts[f"skipped/{sample.cause}"] += sample.count
        applied = {} if stepped and not self.scaler else {"applied": float(stepped)}
        return {**values, "gradient_norm": norm, "learning_rate": lr, **applied}

    def global_counts(self) -> dict[str, int]:
        """Return the counts of all processes together; all of them must call this."""
        return dict(sum(distributed.all_gather_object(self.counts), Counter()))

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient that overflows only asks for a smaller scale."""
        return self.scaler is not None and not self.scaler.stuck

    def save(self) -> None:
        """Write a checkpoint: models for use, and what resuming needs."""
        data_states = distributed.all_gather_object(self.task.loader.state_dict())
        counts = self.global_counts()

        def write(folder: Path) -> None:
            path = folder / TENSORS_NAME
            self.engine.save(path)
            if distributed.is_main():
                for kind, target in (("ema", folder), ("weights", folder / RAW_NAME)):
                    target.mkdir(exist_ok=True)
                    with self.engine.materialize(path, kind) as model:
                        self.task.save(model, target)

        if not distributed.is_main():
            write(Path())
            return
        state = {
            "resume_key": resume_key(self.config),
            "contents": {name: {**found} for name, found in self.task.contents.items()},
            "updates": self.engine.updates,
            "data_state": merge_states(data_states),
            "counts": counts,
        }
        extra = {name: part.state_dict() for name, part in self._extra_state().items()}
        save_checkpoint(self.config.out, self.step, {**state, **extra}, write, self.config.keep)

    def _extra_state(self) -> dict[str, GradientScaler | Plateau]:
        parts = {"scaler": self.scaler, "plateau": self.plateau}
        return {name: part for name, part in parts.items() if part is not None}

    def resume(self) -> None:
        """Load the newest whole checkpoint, if any; ValueError for one of another training."""
        if (found := shared_checkpoint(self.config.out)) is None:
            if self.task.initial_weights is not None:
                self.engine.load_initial(self.task.initial_weights)
            return
        self._restore(found)

    def _restore(self, found: Checkpoint) -> None:
        """Load a checkpoint of this training."""
        out, state, after = self.config.out, found.state, self.task.contents
        with _one_error(found.folder):
            before = state.get("contents", {})
            changed = changed_settings(state["resume_key"], self.config, before, after)
            note = changed_data(before.get("data"), after.get("data"))
        if changed:
            raise ValueError(
                f"{out} holds a training with other settings: {'; '.join(changed)}. "
                "Use the same settings to resume it, or another --out"
            )
        try:
            self.engine.load(found.folder / TENSORS_NAME)
        except (ValueError, SafetensorError) as error:
            raise ValueError(
                f"{out} holds a training of another model, or a damaged one ({error}); use the "
                "same preset and sizes to resume it, or another --out"
            ) from error
        with _one_error(found.folder):
            self.engine.updates, self.step = state["updates"], state["step"]
            for name, part in self._extra_state().items():
                part.load_state_dict(state[name])
            if (data_state := state.get("data_state")) is not None:
                self.task.loader.load_state_dict(data_state)
            if distributed.is_main():  # one process continues the sums of all
                self.counts.update(state["counts"])
        if distributed.is_main():
            newer = f"; incomplete: {', '.join(found.skipped)}" if found.skipped else ""
            print(f"Resuming at step {self.step} of {self.config.steps} in {out}{newer}")
            if note:
                print(note)

    @contextmanager
    def saved_model(self) -> Iterator[Model | None]:
        """Yield the averaged model in this step's checkpoint; None without one."""
        folder = self.config.out / f"step-{self.step}"
        if not folder.is_dir():
            yield None
            return
        with self.engine.materialize(folder / TENSORS_NAME, "ema") as model:
            yield model.to(self.device)

    def finish(self) -> Model:
        """Return the model with its averaged parameters, for good."""
        distributed.barrier()
        self.engine.swap_ema()
        return self.engine.model.eval()


@contextmanager
def _one_error(folder: Path) -> Iterator[None]:
    """Turn what missing or wrong values in a checkpoint's state cause into a ValueError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{folder} is damaged ({reason}); move it away to resume from the one before, or use "
            "another --out"
        ) from error


def step_rng(seed: int, step: int, device: torch.device, part: int = 0) -> torch.Generator:
    """Return the random generator of a part of a step's batch, the same on every run.

    Parts are numbered over all processes: two processes with one part each get the same noise as
    one process that accumulates two parts.
    """
    number = seed * 1_000_000_007 + step + part * 0x9E3779B97F4A7C15
    return torch.Generator(device).manual_seed(number % (1 << 63))


def add_fields(
    sums: dict[str, Tensor], losses: Sequence[Loss], parts: int, device: torch.device
) -> None:
    """Add the fields of the losses / parts to `sums` by name; equal names of losses add up."""
    for loss in losses:
        for field in dataclasses.fields(loss):  # type: ignore[arg-type]
            value = torch.as_tensor(getattr(loss, field.name), device=device).detach()
            sums[field.name] = sums.get(field.name, 0.0) + value.float() / parts
