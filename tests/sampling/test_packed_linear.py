"""A large model is packed in its own memory, and restored to the same bits."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
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


def test_threads_take_turns(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [sample(model, seed) for seed in range(4)]
    monkeypatch.setattr(packed_linear, "LARGE", 0)
    found: dict[int, Tensor] = {}
    threads = [
        Thread(target=lambda seed=seed: found.update({seed: sample(model, seed)}))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], codes) for seed, codes in enumerate(expected))
