"""Settings of every training: optimizer, schedule, precision, engine and intervals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from dalle1.config import check_literals
from dalle1.data.cleaning import CleaningConfig
from dalle1.devices import PRECISIONS, pick_precision
from dalle1.training.schedules import warmup_cosine
from dalle1.training.shared_folder import shared_checkpoint

Config = TypeVar("Config", bound="TrainConfig")

MAX_LEARNING_RATE = 1e3
"""Largest learning rate; far larger ones overflow in the optimizers."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CleaningConfig):
    """Settings of every training."""

    out: Path
    """Output folder. An interrupted training in this folder is resumed."""
    data: str = "toybox"
    """Training data: `toybox` (endless), `toybox:N` (its first N scenes), a folder of images with
    captions, or a folder, glob or {000..123} pattern of WebDataset shards, also behind
    pipe:COMMAND, http(s):// or s3://. Several sources with weights: a::2,b::1."""
    steps: int = 10_000
    """Number of optimizer updates."""
    allow_upscale: bool = False
    """Enlarge images that are smaller than the model's input, instead of skipping them."""
    batch_size: int = 32
    """Samples per update, over all processes."""
    accumulate: int = 1
    """Gradient accumulation: number of parts of each batch, computed one after another to save
    memory; a divisor of the batch size. Losses that compare the samples of a batch (the dVAE's
    usage loss, CLIP's contrastive loss) then compare those of one part."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer: AdamW, or Muon (Jordan et al. 2024) for the matrices of the layers and AdamW for
    the rest. Muon learns more from few samples. Paper: adamw."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    final_learning_rate: float = 1e-5
    """Learning rate at the end of the cosine schedule, and from then on."""
    schedule_steps: int | None = None
    """Updates until the cosine schedule ends, warm-up included. None: the value of --steps."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """Schedule after the warm-up: cosine, or constant and halved when the training loss reaches a
    plateau."""
    plateau_window: int = 5_000
    """Updates over which the training loss is averaged to detect a plateau."""
    warmup_steps: int = 100
    """Updates during which the learning rate rises linearly."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of the parameters selected by --decays."""
    decays: Literal["matrices", "weights", "all"] = "weights"
    """Parameters that decay: matrices; weights, which adds embeddings; or all, which adds gains and
    biases."""
    beta2: float = 0.999
    """AdamW's second β; the first is 0.9."""
    variance_clip: float | None = None
    """Upper limit of AdamW's second-moment estimate. None: no limit."""
    clip_norm: float = 4.0
    """Maximum global norm of the gradient."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the parameters, which is the model that is
    saved for use."""
    ema_every: int = 1
    """Updates between two steps of that moving average."""
    seed: int = 0
    """Random seed of the initial parameters, the batches and all noise."""
    device: str = "auto"
    """Device: auto (cuda, else mps, else cpu), or a device name of torch."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of matrix products and convolutions; parameters stay fp32. auto: bf16 where the
    processor computes it natively, else fp16 on a GPU without ZeRO, else fp32."""
    num_workers: int = 1
    """Worker processes that prepare batches; 0 uses the main process."""
    log_every: int = 50
    """Updates between lines of log.jsonl."""
    validate_every: int = 500
    """Updates between validations, each with sample images."""
    save_every: int = 500
    """Updates between checkpoints."""
    keep: int = 1
    """Number of checkpoints to keep, the latest ones."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage, by DeepSpeed: 1 shards AdamW's state over the processes, 2 gradients too, 3
    parameters too. 0: plain torch, everything in every process. Start several processes with
    torchrun, deepspeed or Slurm."""
    offload: Literal["none", "cpu"] = "none"
    """Device that holds ZeRO's shards of AdamW's state, and of the parameters at stage 3, between
    updates: that of the training (none) or cpu."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Data type of the parameters that ZeRO computes with. bf16 halves their memory; the shards
    that the optimizer updates stay fp32."""
    deepspeed: Path | None = None
    """DeepSpeed config file (JSON) that replaces --zero, --offload
    and --weights."""
    gradient_compression: Literal["none", "powersgd"] = "none"
    """Compression of the gradients that several processes exchange after the warm-up: none, or
    powersgd (Vogels et al. 2019), as in the paper's §E."""
    rank: int = 8
    """Columns of PowerSGD's matrices: more are more exact, and more to exchange. Paper: 896."""
    tensorboard: bool = False
    """Log to OUT/tensorboard as well (`pip install tensorboard`)."""
    wandb: str | None = None
    """Weights & Biases project to log to as well (`pip install wandb`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_literals(self)
        intervals = ("log_every", "validate_every", "save_every")
        windows = ("ema_every", "plateau_window")
        for name in ("steps", "batch_size", "accumulate", *intervals, *windows, "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "final_learning_rate"):
            if not 0 <= getattr(self, name) <= MAX_LEARNING_RATE:
                raise ValueError(
                    f"{name} is {getattr(self, name):g}, expected 0 to {MAX_LEARNING_RATE:g}"
                )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}, expected a divisor of batch_size, "
                f"{self.batch_size}"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}, expected 0 to {(1 << 32) - 1}")
        if not self.clip_norm > 0:  # nor NaN
            raise ValueError(f"clip_norm is {self.clip_norm:g}, expected more than 0, or inf")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected a number in [0, 1)")
        self._check_engine()

    def _check_engine(self) -> None:
        """Refuse combinations of which one setting would be ignored."""
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")
        if self.gradient_compression != "none" and (
            self.uses_deepspeed or self.precision == "fp16"
        ):
            raise ValueError(
                "gradient_compression is powersgd, which needs whole gradients of one scale; "
                "remove --zero, --deepspeed and --precision fp16, or compress by none"
            )
        if self.optimizer == "muon" and self.uses_deepspeed:
            raise ValueError(
                "optimizer is muon, which needs unsharded matrices, and ZeRO shards them; use "
                "--optimizer adamw, or remove --zero and --deepspeed"
            )
        if self.deepspeed is not None and (self.zero or self.weights != "fp32"):
            raise ValueError("--deepspeed FILE replaces --zero and --weights; remove them")
        if self.offload != "none" and not self.zero:
            raise ValueError(
                "--offload cpu needs --zero 1, 2 or 3; a --deepspeed FILE has its own setting"
            )
        if self.weights == "bf16" and (not self.zero or self.precision not in ("auto", "bf16")):
            raise ValueError("--weights bf16 needs --zero 1, 2 or 3 and --precision bf16")
        if self.precision == "fp16" and self.uses_deepspeed:
            raise ValueError(
                "--precision fp16 scales gradients resblock by resblock, which --zero 1, 2, 3 and "
                "--deepspeed do not support; use --precision bf16, or --zero 0"
            )

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed trains the model, rather than plain torch."""
        return self.zero > 0 or self.deepspeed is not None

    def lr_at(self, step: int) -> float:
        """Return the learning rate of an update, before any halving at plateaus."""
        return warmup_cosine(
            step,
            peak=self.learning_rate,
            end=self.final_learning_rate if self.schedule == "cosine" else self.learning_rate,
            warmup=self.warmup_steps,
            duration=self.schedule_steps or self.steps,
        )

    def memory_flags(self) -> list[str]:
        """Return the flags that would lower the memory of this training, for error messages."""
        flags = []
        if self.deepspeed is None and self.optimizer != "muon":
            if self.zero < 3:
                flags.append(f"--zero {self.zero + 1}, over more processes")
            if self.offload == "none":
                flags.append("--offload cpu with --zero")
        return flags


def resolve_precision(config: Config, device: torch.device) -> Config:
    """Return `config` with the precision "auto" replaced by what `device` computes fast.

    A training that resumes keeps the precision of its checkpoint, whatever the machine.
    """
    if config.precision != "auto":
        return config
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    found = shared_checkpoint(config.out)
    state = found.state if found else {}
    stored = state.get("resume_key", {}).get("precision")
    if stored in PRECISIONS:
        return replace(config, precision=stored)
    precision: Any = "bf16" if config.weights == "bf16" else names[pick_precision("auto", device)]
    if precision == "fp16" and (config.uses_deepspeed or config.gradient_compression != "none"):
        precision = "fp32"
    return replace(config, precision=precision)
