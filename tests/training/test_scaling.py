"""fp16: a scale for each resblock keeps what no single scale does; checkpointing."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from function_task import FunctionTask
from torch import Tensor, nn

from dalle1.data.loader import Batch
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.training import resblocks
from dalle1.training.config import TrainConfig
from dalle1.training.scaling import (
    BACKOFF,
    GROWTH,
    INIT_SCALE,
    MAX_SCALE,
    MIN_SCALE,
    PATIENCE,
    LossScaler,
    ResblockScaler,
    scale_gradient,
    unscale_gradient,
)
from dalle1.training.trainer import Trainer

DEPTH, WIDTH = 22, 8


def scaled(branch: Callable[[Tensor], Tensor], x: Tensor, scale: Tensor) -> Tensor:
    return scale_gradient(branch(unscale_gradient(x, scale)), scale)


class Stack(nn.Module):
    """A deep narrow stack of resblocks in fp16, whose gradients quarter from block to block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
        for i, linear in enumerate(self.branches):

            def branch(h: Tensor, linear: nn.Module = linear) -> Tensor:
                h = F.layer_norm(h, (WIDTH,)).to(dtype)
                return F.linear(h, linear.weight.to(dtype), linear.bias.to(dtype))

            y = branch(x).float() if scales is None else scaled(branch, x, scales[i])
            x = 4 * x + y  # so the gradient of an earlier block is four times as large
        return x

    def gradients(self) -> list[Tensor]:
        return [linear.weight.grad for linear in self.branches]


def loss_of(x: Tensor) -> Tensor:
    return (x * torch.linspace(-1, 1, WIDTH)).mean() * 2.0**-34


def inputs() -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))


def exact() -> list[Tensor]:
    stack = Stack()
    loss_of(stack(inputs(), torch.float32)).backward()
    return stack.gradients()


def test_no_single_scale_fits_a_deep_stack() -> None:
    for power in range(0, 60, 2):
        stack = Stack()
        (loss_of(stack(inputs(), torch.float16)) * 2.0**power).backward()
        lost = [not g.isfinite().all() or not g.any() for g in stack.gradients()]
        assert any(lost), f"2^{power} would do"


def test_a_scale_for_each_resblock_does() -> None:
    expected, stack = exact(), Stack()
    sizes = torch.stack([g.abs().max() for g in expected])
    assert sizes.max() / sizes.min() > 2.0**40  # more than from fp16's least number to its most
    scales = ResblockScaler([[linear] for linear in stack.branches])
    wanted = (2.0**4 / sizes).clamp(MIN_SCALE, MAX_SCALE)  # all that the paper allows is enough
    scales.load_state_dict({"scales": wanted, "since_fall": torch.zeros(DEPTH)})
    loss_of(stack(inputs(), torch.float16, scales.scales)).backward()
    assert scales.unscale()
    for gradient, true in zip(stack.gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, true, rtol=0, atol=0.01 * true.abs().max().item())


def test_scales_by_hand() -> None:
    layers = [nn.Linear(2, 2) for _ in range(2)]
    scales = ResblockScaler([[layer] for layer in layers])
    assert scales.scales.tolist() == [INIT_SCALE, INIT_SCALE]

    def update(bad: bool = False) -> bool:
        for layer in layers:
            for p in layer.parameters():
                p.grad = torch.full_like(p, 3.0)
        if bad:
            layers[1].weight.grad[0, 1] = math.inf
        return scales.unscale()

    assert update()
    assert layers[0].weight.grad[0, 0].item() == pytest.approx(3 / INIT_SCALE)
    assert scales.scales.tolist() == pytest.approx([INIT_SCALE * GROWTH] * 2)
    assert not update(bad=True)  # the update is skipped; only the second scale falls
    high, low = scales.scales.tolist()
    assert high == pytest.approx(INIT_SCALE * GROWTH**2)
    assert low == pytest.approx(INIT_SCALE * GROWTH * BACKOFF)
    for _ in range(PATIENCE - 1):
        assert not update(bad=True)  # too soon to fall again
    assert scales.scales[1].item() == pytest.approx(low)
    assert not update(bad=True)
    assert not update(bad=True)
    assert scales.scales[1].item() == pytest.approx(low * BACKOFF)
    state = scales.state_dict()
    other = ResblockScaler([[layer] for layer in layers])
    other.load_state_dict(state)
    assert torch.equal(other.scales, scales.scales)
    assert torch.equal(other.since_fall, scales.since_fall)
    for value, limit in ((1.0, MIN_SCALE), (1e12, MAX_SCALE)):
        scales.scales.fill_(value)
        update()
        assert scales.scales.tolist() == [limit, limit]


def test_nan_gradients_are_not_passed_on() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x + scaled(lambda h: h.half() * 2, x, torch.tensor(2.0**14))
    (y * torch.tensor([1.0, 8.0, 0.5])).sum().backward()
    # 8 · 2^14 · 2 is beyond fp16: that branch's gradient is dropped, the identity's stays.
    assert x.grad.tolist() == [3.0, 8.0, 1.5]


CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["loss", "resblock"])
def test_a_scale_that_cannot_fall_is_stuck(kind: str) -> None:
    model = nn.Linear(1, 1)
    optimizers = [torch.optim.SGD(model.parameters())]
    scale: Any = LossScaler(CPU) if kind == "loss" else ResblockScaler([[model]])
    scale.scale_loss(torch.ones(()))
    falls = 0
    for _ in range(2000):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.inf)
        assert not scale.unscale(optimizers)
        if scale.stuck:
            break
        falls += 1
    # Of a resblock's: 12 falls by √2, 126 updates apart.
    assert falls == (16 if kind == "loss" else 11 * 126 + 1)
    model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
    assert scale.unscale(optimizers)
    assert not scale.stuck


def test_the_ordinary_loss_scale() -> None:
    model = nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(model.parameters())]
    scale = LossScaler(CPU, init_scale=8.0, interval=3)

    def update(value: float) -> bool:
        model.zero_grad()
        scale.scale_loss(model(torch.full((1, 2), value)).sum()).backward()
        return scale.unscale(optimizers)

    assert update(3.0)
    assert model.weight.grad.tolist() == [[3.0, 3.0]]
    assert not update(math.inf)
    assert scale.scaler.get_scale() == 4.0
    assert [update(1.0) for _ in range(3)] == [True] * 3
    assert scale.scaler.get_scale() == 8.0
    update(1.0)
    old, new = LossScaler(CPU, interval=3), LossScaler(CPU, interval=3)
    old.load_state_dict({"scale": 8.0, "good": 4})  # as earlier versions wrote it
    new.load_state_dict(scale.state_dict())
    assert old.state_dict() == new.state_dict() == scale.state_dict()


SIZE = TransformerConfig(
    text_vocab=13, text_len=5, codebook_size=11, grid_size=4, width=16, depth=3, heads=2
)


def gradients(change: Callable[[Transformer], object] = lambda model: None) -> list[Tensor]:
    torch.manual_seed(0)
    model = Transformer(SIZE)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model = copy.deepcopy(model)
    scales = change(model)
    text, codes = torch.arange(10).view(2, 5), torch.arange(32).view(2, 4, 4) % 11
    loss = model.loss(text, codes)
    loss.total.backward()
    if isinstance(scales, ResblockScaler):
        assert scales.unscale()
    return [loss.total.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("how", [{"checkpointing": True}, {"scaling": True}])
def test_other_ways_to_compute_have_the_same_gradients(how: dict[str, bool]) -> None:
    for got, expected in zip(
        gradients(lambda model: resblocks.prepare(model, **how)), gradients(), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_checkpointing_keeps_less() -> None:
    def kept(checkpointing: bool) -> int:
        model = Transformer(SIZE)
        resblocks.prepare(model, checkpointing=checkpointing)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            model.loss(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long))
        return sum(sizes)

    assert kept(True) < kept(False) / 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_have_the_same_loss() -> None:
    def compiled(model: Transformer) -> None:
        for layer in model.layers:
            layer.compile()

    for got, expected in zip(gradients(compiled), gradients(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_transformer_learns_in_fp16_on_a_gpu(tmp_path: Path) -> None:
    size = TransformerConfig(
        text_vocab=10, text_len=4, grid_size=4, width=32, depth=4, heads=2, codebook_size=8
    )
    torch.manual_seed(0)
    model = Transformer(size).cuda()
    config = TrainConfig(
        out=tmp_path, batch_size=4, precision="fp16", device="cuda", warmup_steps=1
    )
    task = FunctionTask(model, lambda m, b, *_: m.loss(b["text"], b["codes"]))
    task.scaler = resblocks.prepare(model, checkpointing=True, scaling=True)
    trainer = Trainer(task, config)
    rng = torch.Generator().manual_seed(0)
    text = torch.randint(10, (4, 4), generator=rng).cuda()
    codes = torch.randint(8, (4, 4, 4), generator=rng).cuda()
    losses = [
        float(trainer.update(Batch(tensors={"text": text, "codes": codes}))["total"])
        for _ in range(200)
    ]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())
