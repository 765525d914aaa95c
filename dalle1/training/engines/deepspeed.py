"""ZeRO by DeepSpeed: processes share out AdamW's state, gradients and weights (paper §2.5).

Rajbhandari et al. 2020, arXiv 1910.02054. The one module that knows of DeepSpeed. It looks into
DeepSpeed's optimizers for the piece of each parameter that a process keeps, and nowhere else.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle1.devices import autocast, pick_device
from dalle1.training import distributed
from dalle1.training.engines.base import (
    Call,
    Engine,
    Model,
    Piece,
    Whole,
    adamw,
    full_shape,
    samples_at_once,
    spoiled,
)

if TYPE_CHECKING:
    from dalle1.training.loop import TrainConfig
    from dalle1.training.trainer import Loss

PASSED_ON = {
    *("bf16", "comms_logger", "communication_data_type", "data_types", "disable_allgather"),
    *("dump_state", "flops_profiler", "gradient_predivide_factor", "memory_breakdown"),
    *("prescale_gradients", "steps_per_print", "wall_clock_breakdown", "zero_optimization"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
}
"""What a config of one's own may say, beside what `TrainConfig` says, too, and then the same."""

_OFFLOAD = {"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"}

WITHIN = {
    "zero_optimization": {
        *("stage", "offload_optimizer", "offload_param", "memory_efficient_linear"),
        *("contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size"),
        *("allgather_partitions", "allgather_bucket_size", "allgather_sequential"),
        *("use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce"),
        *("sub_group_size", "stage3_prefetch_bucket_size", "module_granularity_threshold"),
        *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
        *("ignore_unused_parameters", "log_trace_cache_warnings", "enable_sanity_checks"),
    },
    "offload_optimizer": _OFFLOAD,
    "offload_param": _OFFLOAD,
    "bf16": {"enabled", "check_grad_overflow"},
}
"""What may be said within these. Other ways to share out have no pieces to write, or are ours."""


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """Give what DeepSpeed is to do, by flags or by a file; ValueError for what would be lost."""
    known: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": samples_at_once(config),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip_norm,
    }
    if config.deepspeed is not None:
        return {**_checked(config.deepspeed, known, config.precision), **known}
    # The buffers in which gradients travel would otherwise be of 500 million numbers.
    sharing: dict[str, Any] = {"stage": config.zero, "reduce_bucket_size": 50_000_000}
    if config.offload == "cpu":
        sharing["offload_optimizer"] = {"device": "cpu"}
        if config.zero == 3:
            sharing["offload_param"] = {"device": "cpu"}
    if config.zero == 3:
        sharing["memory_efficient_linear"] = False  # it would replace torch's for good
    more: dict[str, Any] = {"zero_optimization": sharing, "zero_force_ds_cpu_optimizer": False}
    if config.weights == "bf16":
        more["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return {**known, **more, "steps_per_print": 1 << 60}


def _checked(path: Path, known: dict[str, Any], precision: str) -> dict[str, Any]:
    """Read a config of one's own; ValueError for what is not honoured, or says another thing."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}, expected an object")
    for name, value in given.items():
        if name in known:
            if value not in (known[name], "auto"):
                raise ValueError(
                    f"{name} is {value} in {path}, and {known[name]} by --batch-size, --accumulate,"
                    " --clip-norm and the number of processes; make them agree, or say auto"
                )
        elif name not in PASSED_ON:
            raise ValueError(
                f"{name} in {path} is not supported: optimizer, schedule, precision and logs are "
                f"those of the flags. Take it out; there may be {', '.join(sorted(PASSED_ON))}"
            )
    sharing = _within(given, "zero_optimization", path)
    if sharing.get("stage") not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage is {sharing.get('stage')} in {path}, expected 1, 2 or 3; "
            "without --deepspeed every process has everything"
        )
    for name in ("offload_optimizer", "offload_param"):
        if (device := _within(sharing, name, path).get("device", "none")) not in ("cpu", "none"):
            raise ValueError(f"{name}.device is {device} in {path}, expected cpu or none")
    offloads = _within(sharing, "offload_optimizer", path).get("device", "none") == "cpu"
    if given.get("zero_force_ds_cpu_optimizer", False) is not False:
        raise ValueError(
            f"zero_force_ds_cpu_optimizer in {path} asks for DeepSpeed's own AdamW; it is torch's, "
            "wherever its state is kept: take it out"
        )
    if offloads:
        given["zero_force_ds_cpu_optimizer"] = False
    half = _within(given, "bf16", path)
    if half.get("enabled") and (precision != "bf16" or not half.get("check_grad_overflow")):
        raise ValueError(
            f'bf16 in {path} needs --precision bf16, and "check_grad_overflow": true, so that '
            "updates that are no numbers are skipped"
        )
    return given


def _within(given: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Give what a file says within `name`; ValueError for what is not supported there."""
    if not isinstance(inner := given.get(name, {}), dict):
        raise ValueError(f"{name} is {json.dumps(inner)} in {path}, expected an object or nothing")
    if unknown := sorted(inner.keys() - WITHIN[name]):
        raise ValueError(
            f"{name}.{unknown[0]} in {path} is not supported; take it out. There may be "
            f"{', '.join(sorted(WITHIN[name]))}"
        )
    return inner


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for `device`, quietly; ValueError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "--zero and --deepspeed need the package: pip install deepspeed; --zero 0 does without"
        ) from error
    # It asks torch, at every exchange, in words of before.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    # It would compile a kernel to sum over shared memory, at every start that finds none.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not dist.is_initialized():  # a single process
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


def stage_of(config: TrainConfig) -> int:
    """Give the stage of ZeRO: 0 to 3."""
    if config.deepspeed is None:
        return config.zero
    return int(deepspeed_config(config)["zero_optimization"]["stage"])


@contextmanager
def partitioned(config: TrainConfig) -> Iterator[None]:
    """Make models of which each process keeps its part of every weight, where that is asked for.

    A module's weights are taken apart as soon as its own __init__ is through: it has to give them
    their values itself, in `reset_parameters`.
    """
    if stage_of(config) < 3:
        yield
        return
    deepspeed = _deepspeed(pick_device(config.device))
    # Told a dtype, DeepSpeed 0.19 takes bf16 or fp16 whatever it is; its config says the right one.
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config)):
        yield


class Zero(Engine[Model]):
    """DeepSpeed's ZeRO, stage 1, 2 or 3, with torch's AdamW on each process's pieces."""

    sharded = True

    def __init__(self, model: Model, config: TrainConfig) -> None:
        settings = deepspeed_config(config)
        self.stage = int(settings["zero_optimization"]["stage"])
        self.together = self.stage == 3
        buffers = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False)]
        super().__init__(model, config)
        deepspeed = _deepspeed(self.device)
        self.optimizer = adamw(model, config)
        scalars = [p for p in model.parameters() if full_shape(p) == ()]
        for p in model.parameters():  # DeepSpeed sends no other order of memory, and no scalars
            if p.ndim == 4:
                p.data = p.data.clone(memory_format=torch.contiguous_format)
        for p in scalars:
            p.data = p.data.view(1)
        if self.stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)

        def once_sent(_: Any) -> torch.optim.Optimizer:
            for p in scalars:
                p.ds_shape, p.data = torch.Size(), p.data.view(() if len(p) else 0)  # type: ignore[attr-defined]
            return self.optimizer

        self.root, *_ = deepspeed.initialize(
            model=Whole(model), optimizer=once_sent, config=settings
        )
        for module, name, buffer in buffers:  # masks and positions, which bf16 would make coarse
            module._buffers[name] = buffer
        self.shared: Any = self.root.optimizer
        flat = (
            self.shared.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.shared.single_partition_of_fp32_groups
        )
        self.flat: list[Tensor] = flat
        for tensor in flat:
            self.optimizer.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        self.listed = [self._piece(name, p) for name, p in model.named_parameters()]

    def backward(self, call: Call, part: int) -> Loss:
        def within(model: nn.Module) -> tuple[Tensor, Loss]:
            # A cache would keep what was cast of every weight until the end.
            with autocast(self.device, self.config.precision, keep_casts=self.stage < 3):
                loss: Loss = call(model)
            return spoiled(loss.total), loss

        last = part == self.config.accumulate - 1
        self.root.set_gradient_accumulation_boundary(last)
        total, loss = self.root(within)
        self.root.backward(total)  # it divides by the number of parts
        if not last:
            self.root.step()  # which only counts
        return loss

    @torch.no_grad()
    def apply(self, call: Call) -> Any:
        # Within its forward pass DeepSpeed fetches whatever weight is used, by hooks or not.
        return self.root(call) if self.together else call(self.model)

    def update(self, rate: float) -> tuple[Tensor, bool]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.root.step()
        made = bool(self.root.was_step_applied())
        if made:
            self.clip_variance()
        return torch.as_tensor(self.root.get_global_grad_norm()), made

    def pieces(self) -> list[Piece]:
        return self.listed

    def _piece(self, name: str, p: Any) -> Piece:
        if self.stage == 3:
            return self._piece_of_partition(name, p)
        if not p.requires_grad:
            mine = p.data.flatten() if distributed.is_main() else p.data.flatten()[:0]
            return Piece(name=name, shape=p.shape, start=0, held={"weights": mine})
        if (mapping := p._hp_mapping) is None:  # all of it is another process's
            return Piece(name=name, shape=p.shape, start=0, held=self._held(self.flat[0], 0, 0))
        where = mapping.get_hp_fragment_address()
        held = self._held(self.flat[mapping.param_group_index], where.start, where.numel)
        start = mapping.lp_fragment_address.start
        return Piece(name=name, shape=p.shape, start=start, held=held)

    def _piece_of_partition(self, name: str, p: Any) -> Piece:
        share = p.ds_tensor.ds_numel  # the last ones may be partly padding, or all of it
        start = min(share * distributed.rank(), p.ds_numel)
        count = min(share, p.ds_numel - start)
        if not p.requires_grad:
            held = {"weights": p.ds_tensor.data[:count]}
        else:
            group, offset, _ = self.shared.grad_position[self.shared.get_param_id(p)]
            held = self._held(self.flat[group], offset, count)
        return Piece(name=name, shape=torch.Size(p.ds_shape), start=start, held=held)

    def _held(self, flat: Tensor, start: int, count: int) -> dict[str, Tensor]:
        state = self.optimizer.state[flat]
        weights, mean, variance = (
            t.detach().narrow(0, start, count)
            for t in (flat, state["exp_avg"], state["exp_avg_sq"])
        )
        return {"weights": weights, "average": weights.clone(), "mean": mean, "variance": variance}

    @torch.no_grad()
    def refresh(self) -> None:
        shared = self.shared
        if self.stage < 3:
            shared.update_lp_params()
            return
        shared._partition_all_parameters()
        for group in range(len(shared.fp16_groups)):
            shared._reassign_or_swap_out_partitioned_parameters(group)
        if shared.persistent_parameters:  # small ones, which every process has whole
            shared.persistent_parameters[0].all_gather(shared.persistent_parameters)
