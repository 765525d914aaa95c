"""The transformer of the specification, dense and by loops, and tiny models to compare with it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.model.attention import MaskedAttention
from dalle1.model.masks import MaskKind
from dalle1.model.transformer import Transformer, TransformerConfig

L, W, V, TEXT = 5, 4, 11, 13
N = W**2
SIZE = TransformerConfig(
    text_vocab=TEXT, text_len=L, codebook_size=V, grid_size=W, width=16, depth=3, heads=2
)


def loud(config: TransformerConfig = SIZE) -> Transformer:
    """Return a model whose every weight matters, unlike one that is just initialised."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def one_layer(kind: MaskKind) -> Transformer:
    model = loud(TransformerConfig(**{**vars(SIZE), "depth": 1}))
    model.kinds, model.masks = [kind], nn.ModuleDict({kind: MaskedAttention(kind, L, W)})
    return model


def example(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(TEXT + L, (batch, L), generator=generator)
    return text, torch.randint(V, (batch, W, W), generator=generator)


def allowed(kind: str, i: int, j: int) -> bool:
    """Whether state i sees state j, straight from the paper's figure 11."""
    if j > i or i < L or j < L:
        return j <= i
    behind = i - j
    if kind == "row":
        return behind <= W
    if kind == "column":
        return behind % W == 0
    return kind == "full" or any(behind == W * a + c for a in range(6) for c in range(-5, 6))


def reference(model: Transformer, text: Tensor, codes: Tensor) -> Tensor:
    """Return the logits of all states over text and image vocabulary, densely and by loops."""
    w = model.state_dict()
    d, heads = model.config.width, model.config.heads
    result = []
    for caption, image in zip(text.tolist(), codes.flatten(1).tolist(), strict=True):
        states = []
        for position, token in enumerate([TEXT + L, *caption[:-1]]):
            states.append(w["text_embedding.weight"][token] + w["text_position.weight"][position])
        for position, code in enumerate([V, *image[:-1]]):
            where = w["row.weight"][position // W] + w["column.weight"][position % W]
            states.append(w["image_embedding.weight"][code] + where)
        x = torch.stack(states)
        for number, kind in enumerate(model.kinds):
            prefix = f"layers.{number}."
            p = {k.removeprefix(prefix): w[k] for k in w if k.startswith(prefix)}
            p = {k.replace(".branch.", "."): tensor for k, tensor in p.items()}
            y = F.layer_norm(x, (d,), p["attention.norm.weight"], p["attention.norm.bias"])
            q, k, v = (y @ p["attention.qkv.weight"].T + p["attention.qkv.bias"]).chunk(3, -1)
            mixed = torch.zeros_like(x)
            for h in range(heads):
                part = slice(h * d // heads, (h + 1) * d // heads)
                for i in range(len(x)):
                    seen = [j for j in range(len(x)) if allowed(kind, i, j)]
                    scores = k[seen, part] @ q[i, part] / math.sqrt(d // heads)
                    mixed[i, part] = scores.softmax(0) @ v[seen, part]
            x = x + mixed @ p["attention.out.weight"].T + p["attention.out.bias"]
            y = F.layer_norm(x, (d,), p["mlp.norm.weight"], p["mlp.norm.bias"])
            y = y @ p["mlp.up.weight"].T + p["mlp.up.bias"]
            x = x + (y * (1.702 * y).sigmoid()) @ p["mlp.down.weight"].T + p["mlp.down.bias"]
        x = F.layer_norm(x, (d,), w["norm.weight"], w["norm.bias"])
        heads_weight = torch.cat([w["text_head.weight"], w["image_head.weight"]])
        result.append(x @ heads_weight.T + torch.cat([w["text_head.bias"], w["image_head.bias"]]))
    return torch.stack(result)


def scores(model: Transformer, text: Tensor, codes: Tensor) -> Tensor:
    """Return the logits of all states as one tensor, the shorter ones filled up with zeros."""
    return torch.cat([F.pad(x, (0, TEXT + L + V - x.shape[2])) for x in model(text, codes)], 1)


def changed(model: Transformer, token: int | None = None, position: int | None = None) -> list[int]:
    """List the states whose logits change with one text token or with one code."""
    text, codes = example(1)
    before = scores(model, text, codes)
    if token is not None:
        text[0, token] = (text[0, token] + 1) % (TEXT + L)
    if position is not None:
        codes.view(-1)[position] = (codes.view(-1)[position] + 1) % V
    moved = (scores(model, text, codes) - before).abs().amax(-1)[0]
    return (moved > 1e-5).nonzero()[:, 0].tolist()
