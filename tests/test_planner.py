"""The plan: its table by hand, and its sum beside what a training really takes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle1 import activation_memory
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.planner import (
    GIB,
    PLANS,
    Plan,
    activations,
    count_parameters,
    main,
    memory,
    network,
    report,
    seconds,
    smaller,
)
from dalle1.training.fine_tuning import count, freeze

ROOT = Path(__file__).resolve().parent.parent
SIZE = TransformerConfig(
    text_vocab=50, text_len=6, codebook_size=32, grid_size=4, width=32, depth=12, heads=2
)
PLAN = Plan(model=SIZE, batch_size=32, steps=10, checkpointing=True, gpus=4, micro_batch=2)
P = sum(p.numel() for p in Transformer(SIZE).parameters())


def test_parameters_are_counted_without_being_made() -> None:
    assert count_parameters(SIZE) == P
    assert count_parameters(PLANS["12b"].model) == pytest.approx(12.3e9, rel=0.01)


@pytest.mark.parametrize(
    ("zero", "weights", "expected"),
    [
        (0, "fp32", (4, 4, 8, 4)),
        (1, "fp32", (4, 4 + 1, 3, 1)),
        (2, "fp32", (4, 1 + 1, 3, 1)),
        (3, "fp32", (1, 1, 2, 1)),
        (2, "bf16", (2, 0.5 + 1, 3, 1)),
        (3, "bf16", (0.5, 0.5 + 1, 3, 1)),
    ],
)
def test_what_is_shared_by_hand(zero: int, weights: str, expected: tuple[float, ...]) -> None:
    need = memory(replace(PLAN, zero=zero, weights=weights))
    parts = (need.parameters, need.gradients, need.optimizer, need.average)
    assert tuple(x / P for x in parts) == pytest.approx(expected)
    assert need.offloaded == 0


def test_what_is_offloaded_is_elsewhere() -> None:
    here = memory(replace(PLAN, zero=3, weights="bf16"))
    there = memory(replace(PLAN, zero=3, weights="bf16", offload="cpu"))
    assert (there.parameters, there.optimizer, there.average) == (0, 0, 0)
    assert there.total + there.offloaded == pytest.approx(here.total)


def test_activations_grow_with_depth_and_batch() -> None:
    whole = activations(replace(SIZE, depth=8), 2, True)
    assert activations(SIZE, 2, True) > whole > activations(replace(SIZE, depth=8), 1, True)
    assert activations(SIZE, 2, False) > 2 * activations(SIZE, 2, True)
    # What is computed of eight layers and of four holds for sixteen.
    deep = replace(SIZE, depth=16)
    counted = activation_memory._peak(deep, 2, True, "bf16", "fp32", "cuda", True, False)
    assert activations(deep, 2, True) == pytest.approx(counted, rel=1e-3)


def test_time_and_network_by_hand() -> None:
    work = 3 * Transformer(SIZE).flops()
    timed = replace(PLAN, tflops=1e-6, mfu=0.5)
    assert seconds(timed) == pytest.approx(work * 32 * 10 / (4 * 1e6 * 0.5))
    sent = [network(replace(PLAN, zero=zero)) / P for zero in (0, 1, 2, 3)]
    assert PLAN.accumulate == 4
    assert sent == pytest.approx([6, 6, 5 * 4 * 0.75, 3 * 4 * 4 * 0.75])


def test_what_fits_is_found_with_the_fewest_changes() -> None:
    loose = replace(PLAN, checkpointing=False, gpu_memory=1e3)
    for change in ({"checkpointing": True}, {"zero": 1}, {"micro_batch": 1}):
        enough = memory(replace(loose, **change)).total / 2**30
        found = smaller(replace(loose, gpu_memory=enough))
        assert found is not None
        changed = {k: v for k, v in vars(found).items() if v != vars(loose)[k]}
        assert len(changed.keys() - {"gpu_memory"}) == 1


def test_a_report_names_what_would_fit() -> None:
    some = memory(replace(PLAN, zero=1)).total / 2**30
    tight = replace(PLAN, checkpointing=False, gpu_memory=some)
    text = report(tight)
    assert "It does not fit. With " in text
    flags = re.findall(r"--([a-z-]+)(?: (\w+))?", text)
    kinds = {"checkpointing": lambda _: True, "offload": str, "weights": str}
    changes = {n.replace("-", "_"): kinds.get(n, int)(value) for n, value in flags}
    assert memory(replace(tight, **changes)).total / 2**30 <= some
    assert "It fits." in report(replace(PLAN, gpu_memory=1.0))
    assert "use more GPUs" in report(replace(PLAN, gpu_memory=1e-6))


def test_presets_are_planned_as_they_train() -> None:
    half, whole = PLANS["toy-128"], PLANS["toy"]
    assert (half.model.grid_size, whole.model.grid_size) == (16, 32)
    matrices = sum(
        module.weight.numel()
        for module in Transformer(whole.model).layers.modules()
        if isinstance(module, torch.nn.Linear)
    )
    assert memory(whole).optimizer == 8 * count_parameters(whole.model) - 4 * matrices
    with pytest.raises(ValueError, match="zero needs --optimizer adamw"):
        replace(whole, zero=1)
    found = smaller(replace(whole, gpu_memory=memory(whole).total / GIB - 0.1, micro_batch=16))
    assert found is not None
    assert found.zero == 0


def test_impossible_plans_are_refused() -> None:
    for changes in ({"gpus": 3}, {"mfu": 1.5}, {"offload": "cpu"}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"expected|need"):
            replace(PLAN, **changes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [[], ["--checkpointing"]])
def test_a_training_needs_the_planned_memory(how: list[str]) -> None:
    command = [sys.executable, "benchmarks/memory.py", "training", "--batch-size", "2", *how]
    # A CPU without bf16 instructions is many times slower in bf16.
    command += ["--precision", "fp32"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert float(printed.split()[-1]) == pytest.approx(1, abs=0.15), printed


def test_a_lora_run_counts_the_state_of_what_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    model = Transformer(SIZE)
    freeze(model, 4, None, ("image_head",))
    total, trained = count(model), count(model, trained=True)
    assert P < total < 1.3 * P
    assert trained == total - P + 32 * 32 + 32
    single = replace(PLAN, gpus=1, batch_size=2, checkpointing=False)
    plan = replace(single, lora=4, train_only=("image_head",))
    need = memory(plan)
    assert (need.parameters, need.gradients) == (4 * total, 4 * trained)
    assert (need.optimizer, need.average) == (8 * trained, 4 * trained)
    assert need.total < 0.7 * memory(single).total
    assert 0.67 < seconds(plan) / seconds(single) < 1

    flags = ["--lora", "8", "--steps", "10", "--batch-size", "1", "--device", "cpu"]
    main(["1b", *flags, "--gpu-memory", "16"])
    printed = capsys.readouterr().out
    assert "1.32 billion parameters, of which 6.29 million are trained, on 1 GPU" in printed
    assert "It fits." in printed
    assert "seconds for 10 updates of 1" in printed
    with pytest.raises(SystemExit):
        main(["1b", *flags, "--zero", "2"])
    assert "--lora and --train-only need --zero 0" in capsys.readouterr().err
