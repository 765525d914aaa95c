"""Measure the speed of sampling, next to peers and to the machine's limit.

    make bench-peers && python benchmarks/sample.py

`small`, with random weights: 512 wide, 8 layers, 8 heads, one caption of 256 tokens, 1,024 codes.

- dalle1: the whole sampling, from the caption to the last code; `last/first` is the time of a code
  in the last rows over that in the first. Then the limit: bytes that a step must read over the
  memory's measured speed, or FLOPs over the measured matrix rate, whichever takes longer.
- Hugging Face: GPT-2 of the same width and depth with 8,192 tokens, `generate` with a static cache
  of 1,280 positions: 64 tokens, after 32 that are not counted.
- DALLE-pytorch 1.6.6, row, column, row, row attention: a step as its generate.py runs it, without a
  cache, at five positions of the 1,024 and the mean of them; `cached`: with its cache forced on.
- bundled: the model that ships with the project, CLIP and all, as `DallE.candidates` runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from measuring import in_fresh_process, seconds
from peers import dalle_pytorch_model
from torch import nn

from dalle1 import DallE
from dalle1.console import keep_freed_memory
from dalle1.devices import PRECISIONS, matmul_flops_per_second, pick_device
from dalle1.model.masks import image_mask
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling.decoding import candidate_uniforms, generate
from dalle1.tasks.transformer import TRANSFORMER_PRESETS

CONFIG = TransformerConfig(**vars(TRANSFORMER_PRESETS["small"].model))
Result = dict[str, float]
"""`step`: seconds for a code of every candidate; `total`: for all codes of all of them."""


def now() -> float:
    """Return the time, after waiting for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(candidates: int, precision: str) -> Result:
    device = pick_device("auto")
    model = Transformer(CONFIG).eval().to(device, PRECISIONS[precision])
    nn.init.normal_(model.image_head.weight, std=0.02)
    text = torch.randint(CONFIG.text_vocab, (1, CONFIG.text_len), device=device)
    uniforms = candidate_uniforms(0, range(candidates), CONFIG.image_len)
    marks = [now()]
    generate(model, text, uniforms, on_row=lambda *_: marks.append(now()))
    rows = [(b - a) / CONFIG.grid_size for a, b in pairwise(marks)]
    before, after = rows[1:9], rows[-8:]  # the first row has the caption's time in it
    step = median(rows[1:])
    return {
        "step": step,
        "total": marks[-1] - marks[0],
        "growth": sorted(after)[4] / sorted(before)[4],
        "limit": least_time(model, candidates, precision) / step,
    }


def least_time(model: Transformer, candidates: int, precision: str) -> float:
    """Return the least time of a step on this machine in seconds, all keys included."""
    device, kind = model.image_head.weight.device, PRECISIONS[precision]
    read = [p for m in (model.layers, model.image_head) for p in m.parameters()]
    weights, numbers, flops = sum(p.numel() for p in read), 0.0, 0.0
    for mask in model.kinds:
        seen = image_mask(mask, CONFIG.grid_size).float().sum(1).mean().item()
        numbers += 2 * CONFIG.width * (CONFIG.text_len + candidates * seen)
        flops += 4 * CONFIG.width * (CONFIG.text_len + seen) * candidates
    large = torch.ones(2**26, device=device)
    bandwidth = large.nbytes / min(seconds(large.sum, 3) for _ in range(3))
    rate = max(matmul_flops_per_second(device, precision) for _ in range(3))
    reading = (weights + numbers) * kind.itemsize / bandwidth
    return max(reading, (flops + 2 * weights * candidates) / rate)


@torch.inference_mode()
def hugging_face(candidates: int, precision: str) -> Result:
    from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

    device = pick_device("auto")
    config = GPT2Config(
        vocab_size=CONFIG.codebook_size,
        n_positions=CONFIG.length,
        n_embd=CONFIG.width,
        n_layer=CONFIG.depth,
        n_head=CONFIG.heads,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval().to(device, PRECISIONS[precision])
    prompt = torch.randint(CONFIG.codebook_size, (candidates, CONFIG.text_len), device=device)

    def timed(tokens: int) -> float:
        cache = StaticCache(config=config, max_cache_len=CONFIG.length)
        start = now()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            do_sample=True,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
        return now() - start

    timed(4)
    short, long = timed(32), timed(96)
    step = (long - short) / 64
    return {"step": step, "total": short + (CONFIG.image_len - 32) * step}


def dalle_pytorch(candidates: int, precision: str, cached: bool = False) -> Result:
    package, model = dalle_pytorch_model(CONFIG)
    device = pick_device("auto")
    model = model.eval().to(device, PRECISIONS[precision])
    text = torch.randint(1, CONFIG.text_vocab, (candidates, CONFIG.text_len), device=device)
    steps = []
    for position in torch.linspace(0, CONFIG.image_len - 4, 5).long().tolist():
        codes = torch.randint(CONFIG.codebook_size, (candidates, position + 3), device=device)
        cache: dict[str, object] | None = {} if cached else None
        steps.append(_peer_step(package, model, text, codes, cache))
    step = sum(steps) / len(steps)
    return {"step": step, "total": step * CONFIG.image_len}


@torch.inference_mode()
def _peer_step(
    package: object,
    model: nn.Module,
    text: torch.Tensor,
    codes: torch.Tensor,
    cache: dict[str, object] | None,
) -> float:
    """Time a step of its `generate_images` after as many codes, one that is not counted before."""
    times = []
    for ahead in (2, 1):
        start = now()
        logits = model(text, codes[:, : codes.shape[1] - ahead], cache=cache)[:, -1]
        package.gumbel_sample(package.top_k(logits, thres=0.9))  # type: ignore[attr-defined]
        times.append(now() - start)
    return times[-1]


def bundled(candidates: int, precision: str) -> Result:
    model = DallE.from_pretrained(precision=precision)
    start = now()
    model.candidates("an avocado armchair", num_candidates=candidates, guidance=1)
    total = now() - start
    return {"step": total / model.image_tokenizer.grid_size**2, "total": total}


CONTENDERS: dict[str, Callable[[int, str], Result]] = {
    "dalle1": ours,
    "Hugging Face": hugging_face,
    "DALLE-pytorch": dalle_pytorch,
    "DALLE-pytorch cached": lambda n, precision: dalle_pytorch(n, precision, cached=True),
    "bundled": bundled,
}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--here", action="store_true", help="measure the first, in this process")
    options = parser.parse_args(args)
    if options.here:
        torch.manual_seed(0)
        keep_freed_memory()
        measure = CONTENDERS[options.contenders[0]]
        print(json.dumps(measure(options.candidates[0], options.precision[0])))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    head = ("candidates", "ms/step", "images/s", "last/first", "of the limit")
    print(f"{'':20} {'':5}" + "".join(f" {word:>12}" for word in head))
    for precision in options.precision:
        for candidates in options.candidates:
            for name in options.contenders:
                flags = ["--here", "--contenders", name, "--precision", precision]
                flags += ["--candidates", str(candidates)]
                row = in_fresh_process([str(Path(__file__)), *flags])
                cells = [f"{candidates}", f"{1e3 * row['step']:.2f}"]
                cells += [f"{candidates / row['total']:.4f}"]
                cells += [f"{row['growth']:.2f}", f"{row['limit']:.0%}"] if "limit" in row else []
                print(f"{name:20} {precision:5}" + "".join(f" {c:>12}" for c in cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
