"""Estimate the memory, time and network traffic of a stage-2 training.

    dalle1 plan 12b --gpus 64 --gpu-memory 80 --zero 3 --micro-batch 1

Bytes of each GPU, for P parameters on N GPUs, w = 4 for fp32 weights and 2 for bf16 ones; `/N` is
what ZeRO shares out, and --offload cpu moves the shares marked * to the machine's memory:

| zero             | 0  | 1       | 2       | 3       |
|------------------|----|---------|---------|---------|
| weights          | 4P | wP      | wP      | wP/N    |
| fp32 masters *   |    | 4P/N    | 4P/N    | 4P/N, none for fp32 |
| gradients        | 4P | wP      | wP/N    | wP/N    |
| … in fp32, to step * |    | 4P/N    | 4P/N    | 4P/N, none for fp32 |
| AdamW's state *  | 8P | 8P/N    | 8P/N    | 8P/N    |
| average *        | 4P | 4P/N    | 4P/N    | 4P/N    |

(Muon's state is half of AdamW's for the layers' matrices; it has no ZeRO.)

Buffers are the masks; what DeepSpeed gathers gradients in, 50 million numbers; and, with zero 3,
the layers that are whole at a time, a billion numbers. Activations follow no formula but the code:
a step of the real model is taken on tensors without contents, and what is alive at its worst is
counted (of eight layers at most: four more always cost the same).

Over the network, each GPU sends per update, with A parts of its batch one after another:
zero 0 2·4P, zero 1 2wP, zero 2 (A + 1)wP, zero 3 3AwP, each times (N − 1)/N.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle1.console import one_line_errors, parse_preset
from dalle1.devices import autocast
from dalle1.model import attention
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.tasks.transformer import TRANSFORMER_PRESETS
from dalle1.training import resblocks
from dalle1.training.optimizers import layer_matrices
from dvae.model import DOWNSAMPLING

GIB = 2**30
BUCKET = 50_000_000
"""Numbers in the buffer in which DeepSpeed reduces gradients; see `training.engines.deepspeed`."""
LIVE = 1_000_000_000
"""Parameters that DeepSpeed keeps whole at a time at most, by default, under zero 3."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training, and the machines that it is to run on."""

    model: TransformerConfig
    """Its size."""
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
    """Data type of the parameters that ZeRO computes with."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of matrix products."""
    tflops: float = 312.0
    """Peak speed of a GPU in TFLOP/s; 312 is an A100 in bf16."""
    utilisation: float = 0.4
    """Fraction of the peak speed that is reached (MFU); the log of a training reports it."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device whose attention implementation is counted."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer whose state is counted."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "gpus", "gpu_memory", "micro_batch", "tflops"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation is {self.utilisation}, expected a number in (0, 1]")
        if self.batch_size % (self.gpus * self.micro_batch):
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of gpus times micro_batch, "
                f"{self.gpus} × {self.micro_batch}"
            )
        if not self.zero and (self.offload != "none" or self.weights != "fp32"):
            raise ValueError("offload and weights bf16 need --zero 1, 2 or 3")
        if self.zero and self.optimizer == "muon":
            raise ValueError("zero needs --optimizer adamw: muon turns whole matrices")

    @property
    def accumulate(self) -> int:
        """A: parts of a GPU's batch."""
        return self.batch_size // (self.gpus * self.micro_batch)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that each GPU holds at its worst."""

    weights: float
    gradients: float
    optimizer: float
    """Its state, and fp32 masters."""
    average: float
    activations: float
    buffers: float
    offloaded: float = 0.0
    """For each GPU in the machine's memory instead."""

    @property
    def total(self) -> float:
        """On the GPU."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "offloaded")


def parameters(config: TransformerConfig) -> int:
    """Count a transformer's parameters."""
    return sum(p.numel() for p in _formed(config).parameters())


@cache
def _formed(config: TransformerConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def memory(plan: Plan) -> Memory:
    """Tell what each GPU holds, by the table above."""
    p, n = parameters(plan.model), plan.gpus
    model = _formed(plan.model)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    grown = activations(
        plan.model,
        plan.micro_batch,
        plan.checkpointing,
        plan.precision,
        plan.weights,
        plan.device,
        plan.zero < 3,
        fresh=plan.zero == 0 and plan.accumulate == 1,
    )
    if plan.zero == 0:
        halved = layer_matrices(model) if plan.optimizer == "muon" else []
        return Memory(
            weights=4 * p,
            gradients=4 * p,
            optimizer=8 * p - 4 * sum(matrix.numel() for matrix in halved),
            average=4 * p,
            activations=grown,
            buffers=buffers,
        )
    w = 4 if plan.weights == "fp32" else 2
    aliased = plan.zero == 3 and w == 4  # the shares are the fp32 weights themselves
    masters, stepping = (0.0, 0.0) if aliased else (4 * p / n, 4 * p / n)
    shares = {"optimizer": masters + 8 * p / n, "average": 4 * p / n}
    if plan.zero == 3:
        gathered = w * min(p, LIVE)
    else:
        gathered = 0
    offloaded = plan.offload == "cpu"
    held = {
        "weights": w * p / (n if plan.zero == 3 else 1),
        "gradients": w * p / (n if plan.zero >= 2 else 1) + (0 if offloaded else stepping),
        **({"optimizer": 0.0, "average": 0.0} if offloaded else shares),
    }
    in_memory = sum(shares.values()) + stepping if offloaded else 0.0
    if offloaded and plan.zero == 3:
        in_memory += held["weights"]
        held["weights"] = 0.0
    bucket = w * min(BUCKET, p)
    return Memory(
        **held, activations=grown, buffers=buffers + bucket + gathered, offloaded=in_memory
    )


@cache
def activations(
    config: TransformerConfig,
    batch: int,
    checkpointing: bool,
    precision: str = "bf16",
    weights: str = "fp32",
    device: str = "cuda",
    keep_casts: bool = True,
    fresh: bool = False,
) -> float:
    """Count the bytes that a step holds at its worst beside weights and their gradients.

    Args:
        fresh: the gradients are made in the step, the last when activations are few already.
    """
    how = batch, checkpointing, precision, weights, device, keep_casts, fresh
    if config.depth <= 8:
        return _worst(config, *how)
    four, eight = (_worst(replace(config, depth=depth), *how) for depth in (4, 8))
    return eight + (config.depth - 8) / 4 * (eight - four)


def _worst(
    config: TransformerConfig,
    batch: int,
    checkpointing: bool,
    precision: str,
    weights: str,
    device: str,
    keep_casts: bool,
    fresh: bool,
) -> float:
    """Take a step on tensors without contents, and watch what is alive."""
    attend = attention.attend
    if device == "cuda":  # FlexAttention keeps what the fused one keeps: q, k, v, output, sums
        attention.attend = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = Transformer(config)
            if weights == "bf16":
                for module in model.modules():
                    for name, p in module.named_parameters(recurse=False):
                        setattr(module, name, nn.Parameter(p.detach().bfloat16()))
            resblocks.prepare(model, checkpointing=checkpointing)
            if not fresh:
                for p in model.parameters():
                    p.register_post_accumulate_grad_hook(_forget)
            text = torch.zeros(batch, config.text_len, dtype=torch.long)
            codes = torch.zeros(batch, config.image_len, dtype=torch.long)
            with Alive() as alive:
                with autocast(torch.device("cpu"), precision, keep_casts):
                    loss = model.loss(text, codes).total
                loss.backward()
            gradients = (p.grad for p in model.parameters() if p.grad is not None)
            return alive.most - sum(g.numel() * g.element_size() for g in gradients)
    finally:
        attention.attend = attend


def _forget(p: Tensor) -> None:
    p.grad = None


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that were made within it and are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata in given or storage in self.known:
                continue
            self.known.add(storage)
            size = storage.nbytes()
            self.now += size
            weakref.finalize(storage, self._freed, size)
        self.most = max(self.most, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def seconds(plan: Plan) -> float:
    """Tell how long all updates take; what is computed twice is not counted as reached."""
    operations = 3 * _formed(plan.model).flops() * plan.batch_size * plan.steps
    return operations / (plan.gpus * plan.tflops * 1e12 * plan.utilisation)


def network(plan: Plan) -> float:
    """Tell how many bytes each GPU sends in an update."""
    w = 4 if plan.weights == "fp32" else 2
    parts = plan.accumulate
    times = {0: 8, 1: 2 * w, 2: (parts + 1) * w, 3: 3 * parts * w}[plan.zero]
    return times * parameters(plan.model) * (plan.gpus - 1) / plan.gpus


def smaller(plan: Plan) -> Plan | None:
    """Find what fits: of the plans with the fewest changes the cheapest; None if none does."""
    fits: list[Plan] = []
    stages: list[Literal[0, 1, 2, 3]] = [z for z in (0, 1, 2, 3) if z >= plan.zero]
    stages = [0] if plan.optimizer == "muon" else stages
    micro = [plan.micro_batch >> i for i in range(plan.micro_batch.bit_length())]
    micro = [m for m in micro if plan.batch_size % (plan.gpus * m) == 0]
    ways = product(
        [plan.offload, "cpu"], [plan.checkpointing, True], micro, stages, [plan.weights, "bf16"]
    )
    for offload, checkpointing, micro_batch, zero, weights in ways:
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
    """Say it all in some lines."""
    need, p = memory(plan), parameters(plan.model)
    lines = [f"{p / 1e9:.3g} billion parameters on {plan.gpus} GPUs; on each:"]
    for name, value in asdict(need).items():
        if name != "offloaded" or value:
            lines.append(f"  {name:<12}{value / GIB:9.2f} GiB")
    lines.append(f"  {'all':<12}{need.total / GIB:9.2f} GiB of {plan.gpu_memory:g}")
    if need.total <= plan.gpu_memory * GIB:
        lines.append("It fits.")
    elif (other := smaller(plan)) is None:
        lines.append("It does not fit, nor would it with all that is here; take more GPUs.")
    else:
        names = ("zero", "offload", "weights", "micro_batch", "checkpointing")
        changed = [n for n in names if getattr(other, n) != getattr(plan, n)]
        values = ("" if n == "checkpointing" else f" {getattr(other, n)}" for n in changed)
        flags = " ".join(f"--{n.replace('_', '-')}{v}" for n, v in zip(changed, values))
        lines.append(
            f"It does not fit. This would: {flags}, with {memory(other).total / GIB:.2f} GiB."
        )
    flops = 3 * _formed(plan.model).flops()
    lines += [
        f"{flops:.3g} operations a pair, forward and back.",
        f"{seconds(plan) / 86400:.3g} days for {plan.steps:,} updates of {plan.batch_size:,}, at "
        f"{plan.utilisation:.0%} of {plan.tflops:g} TFLOPS.",
        f"{network(plan) / GIB:.3g} GiB sent by each GPU in an update of {plan.accumulate} parts.",
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
