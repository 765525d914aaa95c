"""ZeRO by DeepSpeed: AdamW's state, gradients and parameters are sharded over processes (§2.5).

Rajbhandari et al. 2020, arXiv 1910.02054. The only module that imports DeepSpeed. It reads private
attributes of DeepSpeed's optimizers for the shard of each parameter that a process holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle1.devices import pick_device
from dalle1.json_files import parse_json
from dalle1.training import distributed
from dalle1.training.config import TrainConfig
from dalle1.training.engines.base import (
    Engine,
    LossModule,
    ParamShard,
    Result,
    Tensors,
    samples_at_once,
)
from dalle1.training.optimizers import adamw, full_shape
from dalle1.training.task import Loss, Model, Task

TOP_LEVEL_KEYS = {
    *("bf16", "comms_logger", "communication_data_type", "data_types", "disable_allgather"),
    *("dump_state", "flops_profiler", "gradient_predivide_factor", "memory_breakdown"),
    *("prescale_gradients", "steps_per_print", "wall_clock_breakdown", "zero_optimization"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
}
"""Top-level keys that a DeepSpeed config file may hold, beside those that repeat the flags."""

_OFFLOAD = {"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"}

NESTED_KEYS = {
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
"""Keys that these objects may hold. Other ways to shard have no shards that can be saved."""


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """Return DeepSpeed's config, from flags or a file; ValueError for keys that have no effect."""
    known: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": samples_at_once(config),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip_norm,
    }
    if config.deepspeed is not None:
        return {**_checked(config.deepspeed, known, config.precision), **known}
    # By default the buffers that gradients are reduced in hold 500 million numbers.
    zero: dict[str, Any] = {"stage": config.zero, "reduce_bucket_size": 50_000_000}
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero == 3:
            zero["offload_param"] = {"device": "cpu"}
    if config.zero == 3:
        zero["memory_efficient_linear"] = False  # True replaces torch's linear function
    more: dict[str, Any] = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    if config.weights == "bf16":
        more["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return {**known, **more, "steps_per_print": 1 << 60}


def _checked(path: Path, known: dict[str, Any], precision: str) -> dict[str, Any]:
    """Read a DeepSpeed config file; ValueError for unsupported keys and values."""
    settings = parse_json(path, dict)
    for name, value in settings.items():
        if name in known:
            if value not in (known[name], "auto"):
                raise ValueError(
                    f"{name} is {value} in {path}, and {known[name]} by --batch-size, --accumulate,"
                    " --clip-norm and the number of processes; make them equal, or write auto"
                )
        elif name not in TOP_LEVEL_KEYS:
            raise ValueError(
                f"{name} in {path} is not supported: flags set optimizer, schedule, precision and "
                f"logs. Remove it; supported are {', '.join(sorted(TOP_LEVEL_KEYS))}"
            )
    zero = _nested(settings, "zero_optimization", path)
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage is {zero.get('stage')} in {path}, expected 1, 2 or 3; "
            "without --deepspeed nothing is sharded"
        )
    for name in ("offload_optimizer", "offload_param"):
        if (device := _nested(zero, name, path).get("device", "none")) not in ("cpu", "none"):
            raise ValueError(f"{name}.device is {device} in {path}, expected cpu or none")
    offloads = _nested(zero, "offload_optimizer", path).get("device", "none") == "cpu"
    if settings.get("zero_force_ds_cpu_optimizer", False) is not False:
        raise ValueError(
            f"zero_force_ds_cpu_optimizer in {path} asks for DeepSpeed's own AdamW, expected "
            "torch's; remove it"
        )
    if offloads:
        settings["zero_force_ds_cpu_optimizer"] = False
    half = _nested(settings, "bf16", path)
    if half.get("enabled") and not (
        precision in ("auto", "bf16") and half.get("check_grad_overflow")
    ):
        raise ValueError(
            f'bf16 in {path} needs --precision bf16, and "check_grad_overflow": true, so that '
            "non-finite updates are skipped"
        )
    return settings


def _nested(settings: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return the object under `name`; ValueError for keys that are not supported there."""
    if not isinstance(inner := settings.get(name, {}), dict):
        raise ValueError(f"{name} is {json.dumps(inner)} in {path}, expected an object or nothing")
    if unknown := sorted(inner.keys() - NESTED_KEYS[name]):
        raise ValueError(
            f"{name}.{unknown[0]} in {path} is not supported; remove it. Supported are "
            f"{', '.join(sorted(NESTED_KEYS[name]))}"
        )
    return inner


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed and connect it to the process group; ValueError where it is missing.

    Sets the environment variable that selects DeepSpeed's accelerator.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "--zero and --deepspeed need the package: pip install deepspeed; or use --zero 0"
        ) from error
    # Do not compile a kernel for reductions in shared memory at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # a single process
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


def stage_of(config: TrainConfig) -> int:
    """Return the ZeRO stage, 0 to 3."""
    if config.deepspeed is None:
        return config.zero
    return int(deepspeed_config(config)["zero_optimization"]["stage"])


@contextmanager
def partitioned(config: TrainConfig) -> Iterator[None]:
    """Make models whose parameters are sharded from the start, at ZeRO stage 3.

    A module's own parameters are sharded as soon as its __init__ returns: `reset_parameters` has to
    initialise them before that.
    """
    if stage_of(config) < 3:
        yield
        return
    deepspeed = _deepspeed(pick_device(config.device))
    # Given any dtype here, DeepSpeed 0.19 takes bf16 or fp16; its config has the right one.
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config)):
        yield


class GatheringLossModule(LossModule[Model]):
    """Also evaluates in its forward pass, in which DeepSpeed gathers any parameter that is used."""

    def forward(self, *inputs: Any, evaluate: Callable[[Model], Any] | None = None) -> Any:
        return evaluate(self.model) if evaluate else super().forward(*inputs)


class DeepSpeedEngine(Engine[Model]):
    """DeepSpeed's ZeRO, stage 1, 2 or 3, with torch's AdamW on each process's shards."""

    sharded = True

    def __init__(self, task: Task[Model], config: TrainConfig) -> None:
        model, settings = task.model, deepspeed_config(config)
        self.stage = int(settings["zero_optimization"]["stage"])
        self.collective_eval = self.stage == 3
        buffers = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False)]
        super().__init__(task, config)
        deepspeed = _deepspeed(self.device)
        self.optimizer = adamw(model, config)
        scalars = [p for p in model.parameters() if full_shape(p) == ()]
        for p in model.parameters():  # DeepSpeed broadcasts no other memory format, and no scalars
            if p.ndim == 4:
                p.data = p.data.clone(memory_format=torch.contiguous_format)
        for p in scalars:
            p.data = p.data.view(1)
        if self.stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)

        def after_broadcast(_: Any) -> torch.optim.Optimizer:
            for p in scalars:
                p.ds_shape, p.data = torch.Size(), p.data.view(() if len(p) else 0)  # type: ignore[attr-defined]
            return self.optimizer

        # Without a cache of casts at stage 3: it would keep a cast of every gathered parameter.
        module = GatheringLossModule(task, config.precision, keep_casts=self.stage < 3)
        self.root, *_ = deepspeed.initialize(
            model=module, optimizer=after_broadcast, config=settings
        )
        for owner, name, buffer in buffers:  # masks and positions, which bf16 would round
            owner._buffers[name] = buffer
        self.zero_optimizer: Any = self.root.optimizer
        self.flat: list[Tensor] = (
            self.zero_optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero_optimizer.single_partition_of_fp32_groups
        )
        for tensor in self.flat:
            self.optimizer.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        self.listed = [self._shard(name, p) for name, p in model.named_parameters()]

    def backward(
        self, batch: Tensors, step: int, rng: torch.Generator, last: bool
    ) -> Sequence[Loss]:
        self.root.set_gradient_accumulation_boundary(last)
        total, losses = self.root(batch, step, rng)
        self.root.backward(total)  # divides by the number of parts
        if not last:
            self.root.step()  # only counts
        return losses

    def call(self, call: Callable[[Model], Result]) -> Result:
        return self.root(evaluate=call) if self.collective_eval else call(self.model)

    def step(self, lr: float) -> tuple[Tensor, bool]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.root.step()
        stepped = bool(self.root.was_step_applied())
        if stepped:
            self.clip_variance()
        return torch.as_tensor(self.root.get_global_grad_norm()), stepped

    def shards(self) -> list[ParamShard]:
        return self.listed

    def _shard(self, name: str, p: Any) -> ParamShard:
        if self.stage == 3:
            return self._stage3_shard(name, p)
        if not p.requires_grad:
            part = p.data.flatten() if distributed.is_main() else p.data.flatten()[:0]
            return ParamShard(name=name, shape=p.shape, start=0, tensors={"weights": part})
        if (mapping := p._hp_mapping) is None:  # all of it is in another process
            tensors = self._tensors(self.flat[0], 0, 0)
            return ParamShard(name=name, shape=p.shape, start=0, tensors=tensors)
        address = mapping.get_hp_fragment_address()
        flat = self.flat[mapping.param_group_index]
        tensors = self._tensors(flat, address.start, address.numel)
        start = mapping.lp_fragment_address.start
        return ParamShard(name=name, shape=p.shape, start=start, tensors=tensors)

    def _stage3_shard(self, name: str, p: Any) -> ParamShard:
        size = p.ds_tensor.ds_numel  # the last shards may be padding, in part or as a whole
        start = min(size * distributed.rank(), p.ds_numel)
        count = min(size, p.ds_numel - start)
        if not p.requires_grad:
            tensors = {"weights": p.ds_tensor.data[:count]}
        else:
            number = self.zero_optimizer.get_param_id(p)
            group, offset, _ = self.zero_optimizer.grad_position[number]
            tensors = self._tensors(self.flat[group], offset, count)
        return ParamShard(name=name, shape=torch.Size(p.ds_shape), start=start, tensors=tensors)

    def _tensors(self, flat: Tensor, start: int, count: int) -> dict[str, Tensor]:
        state = self.optimizer.state[flat]
        whole = {"weights": flat, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        parts = {kind: t.detach().narrow(0, start, count) for kind, t in whole.items()}
        return {**parts, "ema": parts["weights"].clone()}

    @torch.no_grad()
    def refresh(self) -> None:
        optimizer = self.zero_optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones, which every process holds as a whole
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
