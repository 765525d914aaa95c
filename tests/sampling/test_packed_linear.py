"""A large model is packed in its own memory, and restored to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tiny_model import tiny_model
from torch import Tensor

from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling import packed_linear
from dalle1.sampling.decoding import generate, null_caption

SIZE = TransformerConfig(
    text_vocab=50, text_len=6, codebook_size=32, grid_size=4, width=32, depth=2, heads=2
)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(SIZE).eval()
    torch.nn.init.normal_(model.image_head.weight)  # it starts at 0
    return model


def sample(model: Transformer, seed: int = 0) -> Tensor:
    uniforms = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed))
    return generate(model, null_caption(model), uniforms)


def test_the_same_codes_and_the_same_weights(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    expected = sample(model)
    sizes: list[int] = []
    original = packed_linear.PackedLinear.forward

    def forward(self: packed_linear.PackedLinear, x: Tensor) -> Tensor:
        sizes.append(model.layers[0].mlp.branch.up.weight.numel())
        return original(self, x)

    monkeypatch.setattr(packed_linear.PackedLinear, "forward", forward)
    sample(model)
    assert min(sizes, default=1) > 0
    monkeypatch.setattr(packed_linear, "LARGE", 0)
    sizes.clear()
    assert torch.equal(sample(model), expected)
    assert set(sizes) <= {0}  # freed while it is packed
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_interruption_restores_the_weights(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample(model)
    monkeypatch.setattr(packed_linear, "LARGE", 0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    uniforms = torch.rand(3, 16)
    with pytest.raises(KeyboardInterrupt):
        generate(model, null_caption(model), uniforms, on_row=interrupt)
    assert torch.equal(sample(model), expected)


def in_another_thread(work: Callable[[], Any]) -> tuple[Thread, list[Any]]:
    """Start `work`; return its thread, and the list that takes its result or its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = Thread(target=run)
    thread.start()
    return thread, found


@pytest.mark.parametrize("use", ["sample", "bits", "complete", "save"])
def test_another_thread_waits_for_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use: str
) -> None:
    dalle = tiny_model()
    model, codes = dalle.transformer, torch.zeros(1, 4, 4, dtype=torch.long)
    uses: dict[str, Callable[[], Any]] = {
        "sample": lambda: sample(model, 1).tolist(),
        "bits": lambda: dalle.bits("a cube", codes)[1].tolist(),
        "complete": lambda: dalle.complete("a", count=2),
        "save": lambda: dalle.save_pretrained(tmp_path),
    }
    expected = uses[use]()
    monkeypatch.setattr(packed_linear, "LARGE", 1)  # freed weights have fewer bytes
    threads = []

    def on_row(_: Tensor, count: int) -> None:
        if count == 1:
            threads.append(in_another_thread(uses[use]))
            threads[0][0].join(0.05)

    generate(model, null_caption(model), torch.rand(3, 16), on_row=on_row)
    (thread, found) = threads[0]
    thread.join()
    assert found == [expected]
    if use == "save":
        assert Transformer.load(tmp_path).config == model.config


@pytest.mark.parametrize("use", ["sample", "bits", "save", "save the transformer"])
def test_the_same_thread_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use: str
) -> None:
    dalle = tiny_model()
    model, codes = dalle.transformer, torch.zeros(1, 4, 4, dtype=torch.long)
    expected = sample(model)
    monkeypatch.setattr(packed_linear, "LARGE", 1)
    uses: dict[str, Callable[[], Any]] = {
        "sample": lambda: sample(model),
        "bits": lambda: dalle.bits("a cube", codes),
        "save": lambda: dalle.save_pretrained(tmp_path),
        "save the transformer": lambda: model.save(tmp_path),
    }
    uniforms = torch.rand(3, 16)
    with pytest.raises(ValueError, match=r"while (it|the model) samples"):
        generate(model, null_caption(model), uniforms, on_row=lambda *_: uses[use]())
    assert not list(tmp_path.iterdir())
    assert torch.equal(sample(model), expected)


def test_what_could_not_be_restored_is_restored_later(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, to_dense, calls = sample(model), Tensor.to_dense, 0
    monkeypatch.setattr(packed_linear, "LARGE", 1)

    def fail_once(self: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("no memory")
        return to_dense(self)

    monkeypatch.setattr(Tensor, "to_dense", fail_once)
    with pytest.raises(MemoryError):
        sample(model)
    assert sum(not parameter.numel() for parameter in model.parameters()) == 1
    assert torch.equal(sample(model), expected)
    assert all(parameter.numel() for parameter in model.parameters())
