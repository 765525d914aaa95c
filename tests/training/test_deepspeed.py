"""The private attributes of DeepSpeed that its engine reads are those of the installed version."""

from __future__ import annotations

import importlib
import inspect

import pytest

deepspeed = pytest.importorskip("deepspeed")


@pytest.mark.parametrize(
    ("module", "name", "methods", "attributes"),
    [
        (
            "deepspeed.runtime.zero.stage_1_and_2",
            "DeepSpeedZeroOptimizer",
            ["update_lp_params"],
            ["self.single_partition_of_fp32_groups", "_hp_mapping"],
        ),
        (
            "deepspeed.runtime.zero.stage3",
            "DeepSpeedZeroOptimizer_Stage3",
            [
                "_partition_all_parameters",
                "_reassign_or_swap_out_partitioned_parameters",
                "get_param_id",
            ],
            [
                "self.fp32_partitioned_groups_flat",
                "self.fp16_groups",
                "self.grad_position",
                "self.persistent_parameters",
            ],
        ),
        (
            "deepspeed.runtime.engine",
            "DeepSpeedEngine",
            ["set_gradient_accumulation_boundary", "was_step_applied", "get_global_grad_norm"],
            [],
        ),
        (
            "deepspeed.runtime.zero.partition_parameters",
            "Init",
            [],
            ["param.ds_tensor", "param.ds_numel", "param.ds_shape", ".ds_tensor.ds_numel"],
        ),
        (
            "deepspeed.utils.tensor_fragment",
            "tensor_fragment",
            ["get_hp_fragment_address"],
            ["lp_fragment_address", "param_group_index"],
        ),
    ],
)
def test_private_attributes_exist(
    module: str, name: str, methods: list[str], attributes: list[str]
) -> None:
    loaded = importlib.import_module(module)
    owner = getattr(loaded, name)
    assert [method for method in methods if not hasattr(owner, method)] == []
    source = inspect.getsource(loaded)
    assert [attribute for attribute in attributes if attribute not in source] == []


def test_the_kernel_that_is_not_compiled_has_this_name() -> None:
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
