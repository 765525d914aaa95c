"""Estimate the memory, time and network traffic of a stage-2 training.

    dalle1 plan 12b --gpus 64 --gpu-memory 80 --zero 3 --micro-batch 1

Bytes per GPU, for P parameters on N GPUs, with w = 4 for fp32 parameters and 2 for bf16. ZeRO
shards what is marked /N; --offload cpu moves the rows marked * to the machine's memory:

| zero             | 0  | 1       | 2       | 3       |
|------------------|----|---------|---------|---------|
| parameters       | 4P | wP      | wP      | wP/N    |
| fp32 masters *   |    | 4P/N    | 4P/N    | 4P/N, none for fp32 |
| gradients        | 4P | wP      | wP/N    | wP/N    |
| fp32 gradients * |    | 4P/N    | 4P/N    | 4P/N, none for fp32 |
| AdamW's state *  | 8P | 8P/N    | 8P/N    | 8P/N    |
| average *        | 4P | 4P/N    | 4P/N    | 4P/N    |

With --lora or --train-only, gradients, AdamW's state and average have trained parameters alone.
(Muon's state is half of AdamW's for the layers' matrices; it does not support ZeRO.)

Buffers are the masks, DeepSpeed's gradient bucket (50 million numbers) and, with zero 3, the layers
that are gathered at a time (a billion numbers). Activations are counted: a training
step of the model runs on fake tensors, and the peak of live bytes is taken (with at most eight
layers; deeper models are extrapolated linearly).

Over the network, each GPU sends per update, with A micro-batches per update:
zero 0 2·4P, zero 1 2wP, zero 2 (A + 1)wP, zero 3 3AwP, each times (N − 1)/N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Literal

import torch

from dalle1.activation_memory import activations
from dalle1.console import one_line_errors, parse_preset
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.tasks.transformer import TRANSFORMER_PRESETS
from dalle1.training.fine_tuning import check_lora, count, freeze, training_flops
from dalle1.training.optimizers import layer_matrices
from dvae.model import DOWNSAMPLING

GIB = 2**30
BUCKET = 50_000_000
"""Numbers in the buffer in which DeepSpeed reduces gradients; see `training.engines.deepspeed`."""
LIVE = 1_000_000_000
"""Parameters that DeepSpeed keeps whole at a time at most, by default, under zero 3."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training and the machines that it runs on."""

    model: TransformerConfig
    """Architecture of the transformer."""
    batch_size: int
    """Pairs per update, over all GPUs."""
    steps: int
    """Number of optimizer updates."""
    checkpointing: bool
    """Activation checkpointing of each resblock."""
    gpus: int = 1
    """Number of GPUs on all machines."""
    gpu_memory: float = 80.0
    """Memory of each GPU, in GiB."""
    micro_batch: int = 1
    """Pairs per GPU and forward pass."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage, by DeepSpeed; 0 is plain torch."""
    offload: Literal["none", "cpu"] = "none"
    """Device that holds the ZeRO shards between updates: the GPU (none) or cpu."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Data type of the parameters under ZeRO."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of matrix products."""
    tflops: float = 312.0
    """Peak speed of a GPU in TFLOP/s; 312 is an A100 in bf16."""
    mfu: float = 0.4
    """Fraction of the peak speed that is reached (MFU); training logs report it."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device whose attention implementation is counted."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer whose state is counted."""
    lora: int | None = None
    """Rank of LoRA's updates, beside which all parameters are frozen."""
    train_only: tuple[str, ...] = ()
    """Patterns of the names of parameters to train; all others are frozen, except LoRA's."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "gpus", "gpu_memory", "micro_batch", "tflops"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}, expected a number in (0, 1]")
        if self.batch_size % (self.gpus * self.micro_batch):
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of gpus times micro_batch, "
                f"{self.gpus} × {self.micro_batch}"
            )
        if not self.zero and (self.offload != "none" or self.weights != "fp32"):
            raise ValueError("offload and weights bf16 need --zero 1, 2 or 3")
        if self.zero and self.optimizer == "muon":
            raise ValueError("zero needs --optimizer adamw: muon updates whole matrices")
        check_lora(self.lora, None)
        if self.zero and (self.lora is not None or self.train_only):
            raise ValueError("--lora and --train-only need --zero 0; remove one of them")

    @property
    def accumulate(self) -> int:
        """Number of micro-batches per GPU and update, A."""
        return self.batch_size // (self.gpus * self.micro_batch)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes on each GPU."""

    parameters: float
    gradients: float
    optimizer: float
    """Optimizer state and fp32 master parameters."""
    average: float
    activations: float
    buffers: float
    offloaded: float = 0.0
    """Bytes per GPU that are kept in the machine's memory instead."""

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "offloaded")


def count_parameters(config: TransformerConfig) -> int:
    """Count a transformer's parameters."""
    return count(_on_meta(config))


@cache
def _on_meta(
    config: TransformerConfig, lora: int | None = None, train_only: tuple[str, ...] = ()
) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
        freeze(model, lora, None, train_only)
        return model


def model_of(plan: Plan) -> Transformer:
    """Return the plan's model on the meta device, with LoRA and frozen parameters."""
    return _on_meta(plan.model, plan.lora, plan.train_only)


def memory(plan: Plan) -> Memory:
    """Return the bytes on each GPU, by the table above."""
    model, n = model_of(plan), plan.gpus
    p, trained = count(model), count(model, trained=True)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    activation_bytes = activations(
        plan.model,
        plan.micro_batch,
        plan.checkpointing,
        plan.precision,
        plan.weights,
        plan.device,
        plan.zero < 3,
        fresh=plan.zero == 0 and plan.accumulate == 1,
        lora=plan.lora,
        train_only=plan.train_only,
    )
    if plan.zero == 0:
        halved = layer_matrices(model) if plan.optimizer == "muon" else []
        return Memory(
            parameters=4 * p,
            gradients=4 * trained,
            optimizer=8 * trained - 4 * sum(matrix.numel() for matrix in halved),
            average=4 * trained,
            activations=activation_bytes,
            buffers=buffers,
        )
    w = 4 if plan.weights == "fp32" else 2
    aliased = plan.zero == 3 and w == 4  # the shards are the fp32 parameters themselves
    masters, stepping = (0.0, 0.0) if aliased else (4 * p / n, 4 * p / n)
    shards = {"optimizer": masters + 8 * p / n, "average": 4 * p / n}
    gathered = w * min(p, LIVE) if plan.zero == 3 else 0
    offloaded = plan.offload == "cpu"
    held = {
        "parameters": w * p / (n if plan.zero == 3 else 1),
        "gradients": w * p / (n if plan.zero >= 2 else 1) + (0 if offloaded else stepping),
        **({"optimizer": 0.0, "average": 0.0} if offloaded else shards),
    }
    in_memory = sum(shards.values()) + stepping if offloaded else 0.0
    if offloaded and plan.zero == 3:
        in_memory += held["parameters"]
        held["parameters"] = 0.0
    bucket = w * min(BUCKET, p)
    return Memory(
        **held,
        activations=activation_bytes,
        buffers=buffers + bucket + gathered,
        offloaded=in_memory,
    )


def seconds(plan: Plan) -> float:
    """Return the duration of the training; recomputed activations do not count as FLOPs."""
    flops = training_flops(model_of(plan)) * plan.batch_size * plan.steps
    return flops / (plan.gpus * plan.tflops * 1e12 * plan.mfu)


def duration(seconds: float) -> str:
    """Format a duration in the largest unit of which it has at least one."""
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((name for name, size in units.items() if seconds >= size), "seconds")
    return f"{seconds / units[unit]:.3g} {unit}"


def network(plan: Plan) -> float:
    """Return the bytes that each GPU sends per update."""
    w = 4 if plan.weights == "fp32" else 2
    parts = plan.accumulate
    factors = {0: 8, 1: 2 * w, 2: (parts + 1) * w, 3: 3 * parts * w}[plan.zero]
    return factors * count(model_of(plan), trained=True) * (plan.gpus - 1) / plan.gpus


def smaller(plan: Plan) -> Plan | None:
    """Return the plan with the fewest changes that fits in memory; None if no plan does."""
    fits: list[Plan] = []
    stages: list[Literal[0, 1, 2, 3]] = [z for z in (0, 1, 2, 3) if z >= plan.zero]
    stages = [0] if plan.optimizer == "muon" or plan.lora or plan.train_only else stages
    micro = [plan.micro_batch >> i for i in range(plan.micro_batch.bit_length())]
    micro = [m for m in micro if plan.batch_size % (plan.gpus * m) == 0]
    options = product(
        [plan.offload, "cpu"], [plan.checkpointing, True], micro, stages, [plan.weights, "bf16"]
    )
    for offload, checkpointing, micro_batch, zero, weights in options:
        if not zero and (offload != "none" or weights != "fp32"):
            continue
        tried = replace(
            plan,
            offload=offload,
            checkpointing=checkpointing,
            micro_batch=micro_batch,
            zero=zero,
            weights=weights if plan.precision == "bf16" else plan.weights,
        )
        if memory(tried).total <= plan.gpu_memory * GIB:
            fits.append(tried)
    before = vars(plan)
    return min(fits, key=lambda p: sum(v != before[k] for k, v in vars(p).items()), default=None)


def report(plan: Plan) -> str:
    """Format memory, time and network traffic as text."""
    need, model = memory(plan), model_of(plan)
    p, trained = count(model), count(model, trained=True)
    gpus = f"{plan.gpus} GPU{'s' * (plan.gpus > 1)}"
    part = f", of which {trained / 1e6:.3g} million are trained," if trained < p else ""
    lines = [f"{p / 1e9:.3g} billion parameters{part} on {gpus}. Memory per GPU:"]
    for name, value in asdict(need).items():
        if name != "offloaded" or value:
            lines.append(f"  {name:<12}{value / GIB:9.2f} GiB")
    lines.append(f"  {'total':<12}{need.total / GIB:9.2f} GiB of {plan.gpu_memory:g}")
    if need.total <= plan.gpu_memory * GIB:
        lines.append("It fits.")
    elif (other := smaller(plan)) is None:
        lines.append("It does not fit, even with all memory-saving options; use more GPUs.")
    else:
        names = ("zero", "offload", "weights", "micro_batch", "checkpointing")
        changed = [n for n in names if getattr(other, n) != getattr(plan, n)]
        values = ("" if n == "checkpointing" else f" {getattr(other, n)}" for n in changed)
        flags = " ".join(f"--{n.replace('_', '-')}{v}" for n, v in zip(changed, values))
        lines.append(
            f"It does not fit. With {flags} it fits in {memory(other).total / GIB:.2f} GiB."
        )
    flops = training_flops(model)
    lines += [
        f"{flops:.3g} FLOPs per pair, forward and backward.",
        f"{duration(seconds(plan))} for {plan.steps:,} updates of {plan.batch_size:,}, at "
        f"{plan.mfu:.0%} of {plan.tflops:g} TFLOP/s.",
        f"{network(plan) / GIB:.3g} GiB sent by each GPU per update of {plan.accumulate} "
        "micro-batches.",
    ]
    return "\n".join(lines)


PLANS = {
    name: Plan(
        model=TransformerConfig(
            **asdict(recipe.model), grid_size=(recipe.image_size or 256) // DOWNSAMPLING
        ),
        batch_size=recipe.batch_size,
        steps=recipe.steps,
        checkpointing=recipe.checkpointing,
        optimizer=recipe.optimizer,
    )
    for name, recipe in TRANSFORMER_PRESETS.items()
}


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        print(report(parse_preset(PLANS, args, (__doc__ or "").splitlines()[0])))
