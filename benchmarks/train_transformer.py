"""Measure the transformer's training beside DALLE-pytorch's and a plain, dense GPT.

    make bench-peers && python benchmarks/train_transformer.py

`small`: 512 wide, 8 layers, 8 heads, 256 + 1024 positions, 16,384 text and 8,192 image tokens.
A step is forward, loss, backward, AdamW; the table has samples per second and the peak memory of
training beyond the model and its data. DALLE-pytorch has row, column, row, row attention; the GPT
the same width and depth, causal attention by torch's SDPA, one vocabulary. Each runs in a process
of its own, with the same threads, and with the memory that they free kept for the next step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from measuring import in_fresh_process, peak_memory, seconds
from peers import dalle_pytorch_model
from torch import Tensor, nn

from dalle1.console import keep_freed_memory
from dalle1.devices import autocast, matmul_flops_per_second, pick_device
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.tasks.transformer import TRANSFORMER_PRESETS

Loss = Callable[[Tensor, Tensor], Tensor]
"""Text [B, L] and codes [B, N] to a loss."""

CONFIG = TransformerConfig(**vars(TRANSFORMER_PRESETS["small"].model))


def ours() -> tuple[nn.Module, Loss]:
    model = Transformer(CONFIG)
    return model, lambda text, codes: model.loss(text, codes).total


def peer() -> tuple[nn.Module, Loss]:
    _, model = dalle_pytorch_model(CONFIG)
    return model, lambda text, codes: model(text, codes, return_loss=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        d = CONFIG.width
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        split = "b t (three h d) -> three b h t d"
        q, k, v = rearrange(self.qkv(self.first(x)), split, three=3, h=CONFIG.heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(y, "b h t d -> b t (h d)"))
        return x + self.mlp(self.second(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = CONFIG.text_vocab + CONFIG.codebook_size
        self.tokens = nn.Embedding(self.vocabulary, CONFIG.width)
        self.positions = nn.Embedding(CONFIG.length, CONFIG.width)
        self.blocks = nn.Sequential(*(Block() for _ in range(CONFIG.depth)))
        self.norm = nn.LayerNorm(CONFIG.width)
        self.head = nn.Linear(CONFIG.width, self.vocabulary)

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        stream = torch.cat([text, codes + CONFIG.text_vocab], dim=1)
        x = self.tokens(stream[:, :-1]) + self.positions.weight[:-1]
        logits = self.head(self.norm(self.blocks(x))).float()
        return F.cross_entropy(logits.flatten(0, 1), stream[:, 1:].flatten())


def gpt() -> tuple[nn.Module, Loss]:
    model = GPT()
    return model, model.forward


CONTENDERS = {"dalle1": ours, "DALLE-pytorch": peer, "dense GPT": gpt}


def measure(name: str, batch_size: int, precision: str, repeats: int) -> dict[str, float]:
    """Measure one contender, in this process."""
    torch.manual_seed(0)
    keep_freed_memory()
    device = pick_device("auto")
    model, loss = CONTENDERS[name]()
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    text = torch.randint(1, CONFIG.text_vocab, (batch_size, CONFIG.text_len), device=device)
    codes = torch.randint(CONFIG.codebook_size, (batch_size, CONFIG.image_len), device=device)
    before = peak_memory()

    def step() -> None:
        with autocast(device, precision):
            value = loss(text, codes)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    result = {
        "samples": batch_size / seconds(step, repeats),
        "memory": peak_memory() - before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "mfu": 0.0,
    }
    if isinstance(model, Transformer):
        rate = matmul_flops_per_second(device, precision)
        result["mfu"] = 3 * model.flops() * result["samples"] / rate
    return result


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many is taken")
    parser.add_argument("--only", choices=CONTENDERS, help="measure this one, in this process")
    options = parser.parse_args(args)
    if options.only:
        size, precision = options.batch_size[0], options.precision[0]
        print(json.dumps(measure(options.only, size, precision, options.repeats)))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{'':14} {'':5} {'batch':>5} {'M parameters':>15} {'samples/s':>9} {'MiB':>7} {'mfu':>11}"
    )
    for precision in options.precision:
        for size in options.batch_size:
            for name in CONTENDERS:
                flags = ["--only", name, "--batch-size", str(size), "--precision", precision]
                flags += ["--repeats", str(options.repeats)]
                row = in_fresh_process([str(Path(__file__)), *flags])
                used = f"{row['mfu']:.0%}" if row["mfu"] else ""
                print(
                    f"{name:14} {precision:5} {size:>5} {row['parameters'] / 1e6:>15.1f} "
                    f"{row['samples']:>9.3f} {row['memory']:>7.0f} {used:>11}",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
