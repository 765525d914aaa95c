"""Muon moves the layers' matrices, AdamW the rest, and a checkpoint has what both know."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import two_processes
from function_task import FunctionTask
from safetensors.torch import load_file
from torch import nn
from two_processes import HALF, SIZE, STEPS, config_for, loss, stream

from dalle1.model.transformer import Transformer
from dalle1.training import optimizers
from dalle1.training.checkpoint import TENSORS_NAME
from dalle1.training.engines.ddp import DDPEngine
from dalle1.training.optimizers import Muon, layer_matrices
from dalle2.unet import UNet, UNetConfig


def test_an_update_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_for(tmp_path, optimizer="muon", weight_decay=0.0, clip_norm=math.inf)
    model = Transformer(SIZE)
    # Heads of zero would block every gradient.
    for head in (model.text_head, model.image_head):
        nn.init.normal_(head.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = DDPEngine(FunctionTask(model, loss), config)
    (value,) = engine.backward(next(stream(0)), 0, torch.Generator(), last=True)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    engine.step(0.01)
    assert value.total > 0
    matrices = {id(p) for p in layer_matrices(model)}
    assert len(matrices) == 4 * SIZE.depth
    for name, p in model.named_parameters():
        step = p.detach() - before[name]
        if id(p) not in matrices:
            moved = step[gradients[name].abs() > 1e-6]
            torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01), rtol=0.02, atol=0)
            continue
        u, s, vh = torch.linalg.svd(gradients[name], full_matrices=False)
        # Newton's and Schulz's iterations bring all but the least of singular values to about 1.
        u, vh = u[:, s > 0.1 * s[0]], vh[s > 0.1 * s[0]]
        length = 0.01 * 0.2 * math.sqrt(max(p.shape))
        along = torch.einsum("ir,ij,rj->r", u, -step, vh) / length
        assert all(0.3 < value < 1.4 for value in along), name
        assert along.mean() == pytest.approx(0.95, abs=0.2), name


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    two_processes.train(tmp_path / "whole", optimizer="muon")
    two_processes.train(tmp_path / "parts", optimizer="muon", steps=HALF)
    two_processes.train(tmp_path / "parts", optimizer="muon")
    whole, parts = (
        load_file(tmp_path / run / f"step-{STEPS}" / TENSORS_NAME) for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    matrices = [key for key in whole if "layers" in key and whole[key].ndim == 2]
    assert sum(key.startswith("mean/") for key in matrices) == 4 * SIZE.depth
    assert not any(key.startswith("variance/") for key in matrices)
    assert all(whole[key].any() for key in matrices)


def test_a_training_keeps_its_optimizer(tmp_path: Path) -> None:
    two_processes.train(tmp_path, steps=HALF)
    with pytest.raises(ValueError, match="optimizer"):
        two_processes.train(tmp_path, optimizer="muon")


@pytest.mark.parametrize("together", [1, 400, 1 << 25])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.0), (torch.float32, 0.02)])
def test_muon_is_torchs_up_to_the_rounding_of_bf16(
    dtype: torch.dtype, rounding: float, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "MAX_TOGETHER", together)
    torch.manual_seed(0)
    shapes = (24, 8), (8, 24), (24, 8), (16, 16), (24, 8), (8, 24)
    starts = [torch.randn(shape) for shape in shapes]
    moved = []
    for kind in (
        partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
        partial(Muon, dtype=dtype),
    ):
        weights = [nn.Parameter(start.clone()) for start in starts]
        optimizer = kind(weights, lr=0.1, weight_decay=0.2)
        for p in weights:
            optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        for step in range(3):
            for p, start in zip(weights, starts, strict=True):
                p.grad = start.roll(step, 0)
            weights[2].grad = None
            optimizer.step()
        moved.append([p.detach() - start for p, start in zip(weights, starts, strict=True)])
    assert not moved[1][2].any()
    for theirs, ours in zip(*moved, strict=True):
        assert (theirs - ours).norm() <= (rounding + 1e-6) * theirs.norm()


def test_a_kernel_moves_as_the_matrix_of_its_rows() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    gradient = torch.randn(6, 4, 3, 3)
    for p in (kernel, matrix):
        p.grad = gradient.reshape(p.shape).clone()
        optimizer = Muon([p], lr=0.1, weight_decay=0.2)
        optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        optimizer.step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


def test_of_a_u_net_its_convolutions_move() -> None:
    unet = UNet(UNetConfig(width=8, attention=(8,), head_width=8, side=16, text_width=4))
    moved = {id(p) for p in layer_matrices(unet)}
    names = {name for name, p in unet.named_parameters() if id(p) in moved}
    assert {"down.0.block.conv_in.weight", "middle.0.block.modulation.weight"} <= names
    assert not {"input.weight", "time.0.weight", "output.2.weight"} & names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_runs_in_bf16_where_the_device_computes_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(optimizers, "pick_precision", lambda name, device: dtype)
    found = optimizers.muon(Transformer(SIZE), config_for(tmp_path, optimizer="muon"))
    assert found.dtype == dtype


def test_zero_refuses_muon(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"muon, which needs unsharded matrices.*remove --zero"):
        config_for(tmp_path, optimizer="muon", zero=1)


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    task, config = FunctionTask(nn.Linear(3, 2), loss), config_for(tmp_path, optimizer="muon")
    with pytest.raises(ValueError, match="no matrices for it; expected adamw"):
        DDPEngine(task, config)
