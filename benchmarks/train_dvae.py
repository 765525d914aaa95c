"""Measure the dVAE beside DALLE-pytorch's DiscreteVAE and OpenAI's modules.

    make bench-peers && python benchmarks/train_dvae.py

Training steps (forward, loss, backward, AdamW) and encoding to codes, in images per second, and the
most memory held. OpenAI's modules have the same shape as ours and are trained with the same loss;
DiscreteVAE has the same number of parameters, codes and channels a code, three layers and two
resblocks, its training script's defaults, and its own loss. All run in processes of their own, with
the same threads, and with the memory that they free kept for the next step.

The work is what a training step's convolutions and matrix products multiply and add; the share is
that work beside what the same time would give at the rate of a lone 3 × 3 convolution of 128
channels, that is beside a step of nothing but convolutions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import in_fresh_process, peak_memory, seconds
from peers import dalle_pytorch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle1.console import keep_freed_memory
from dalle1.devices import PRECISIONS, autocast, pick_device
from dvae import DVAE, DVAEConfig, dvae_loss
from dvae.losses import squeeze_pixels

Contender = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""A model, its loss on images, and its codes of images."""

CODE_WIDTH = 128
CONTENDERS = ("dalle1", "DALLE-pytorch", "dall_e")


def ours(size: int, width: int, codes: int) -> Contender:
    config = DVAEConfig(image_size=size, width=width, codebook_size=codes, code_width=CODE_WIDTH)
    model = DVAE(config)

    def loss(images: Tensor) -> Tensor:
        stats, logits = model(images, 0.5)
        return dvae_loss(images, stats, logits, beta=1.0).total

    return model, loss, model.encode


def discrete_vae(size: int, width: int, codes: int) -> Contender:
    def build(hidden: int) -> nn.Module:
        return dalle_pytorch().DiscreteVAE(
            image_size=size,
            num_tokens=codes,
            codebook_dim=CODE_WIDTH,
            num_layers=3,
            num_resnet_blocks=2,
            hidden_dim=hidden,
            kl_div_loss_weight=1e-3,
        )

    wanted = parameters(ours(size, width, codes)[0])
    with torch.device("meta"):
        hidden = min(range(8, 1024, 8), key=lambda h: abs(parameters(build(h)) - wanted))
    model = build(hidden)
    return model, lambda x: model(x, return_loss=True, temp=0.5), model.get_codebook_indices


def openai(size: int, width: int, codes: int) -> Contender:
    import dall_e

    encoder = dall_e.Encoder(n_hid=width, vocab_size=codes)
    decoder = dall_e.Decoder(n_hid=width, n_init=CODE_WIDTH, vocab_size=codes)

    def loss(images: Tensor) -> Tensor:
        logits = encoder(squeeze_pixels(images)).float()
        stats = decoder(F.gumbel_softmax(logits, tau=0.5, dim=1))
        return dvae_loss(images, stats, logits.permute(0, 2, 3, 1), beta=1.0).total

    def encode(images: Tensor) -> Tensor:
        return encoder(squeeze_pixels(images)).argmax(1)

    return nn.ModuleList([encoder, decoder]).requires_grad_(), loss, encode


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Measure one contender, in this process."""
    torch.manual_seed(0)
    keep_freed_memory()
    build = dict(zip(CONTENDERS, (ours, discrete_vae, openai)))[options.only]
    model, loss, encode = build(options.image_size, options.width, options.codebook_size)
    device = pick_device("auto")
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=1e-4, fused=True)
    images = torch.rand(options.batch_size, 3, options.image_size, options.image_size).to(device)
    before = peak_memory()

    def step() -> None:
        with autocast(device, options.precision):
            value = loss(images)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def encoding() -> None:
        with torch.no_grad(), autocast(device, options.precision):
            encode(images)

    training = seconds(step, options.repeats)
    memory = peak_memory() - before
    with FlopCounterMode(display=False) as counter:
        step()
    work = counter.get_total_flops() / options.batch_size
    return {
        "work": work,
        "share": work * options.batch_size / training / convolution_rate(device, options.precision),
        "parameters": parameters(model),
        "training": options.batch_size / training,
        "encoding": options.batch_size / seconds(encoding, options.repeats),
        "memory": memory,
    }


def convolution_rate(device: torch.device, precision: str) -> float:
    """Return the FLOPs per second of a 3 × 3 convolution of 128 channels, the best of three."""
    images = torch.rand(16, 128, 64, 64, device=device).to(memory_format=torch.channels_last)
    images = images.to(PRECISIONS[precision])
    layer = nn.Conv2d(128, 128, 3, padding=1).to(device, images.dtype)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        fastest = min(seconds(lambda: layer(images), 5) for _ in range(3))
    return 2 * images.numel() * 128 * 9 / fastest


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--codebook-size", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many is taken")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--only", choices=CONTENDERS, help="measure this one, in this process")
    options = parser.parse_args(args)
    if options.only:
        options.precision = options.precision[0]
        print(json.dumps(measure(options)))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {vars(options)}")
    print(
        f"{'':14} {'':5} {'million':>8} {'trained':>8} {'encoded':>8} {'memory':>8} "
        f"{'work':>8} {'share':>8}"
    )
    print(f"{'':14} {'':5} {'weights':>8} {'a second':>8} {'a second':>8} {'MiB':>8} {'GFLOP':>8}")
    given = list(sys.argv[1:] if args is None else args)
    for precision in options.precision:
        for name in CONTENDERS:
            flags = [*given, "--only", name, "--precision", precision]
            row = in_fresh_process([str(Path(__file__)), *flags])
            print(
                f"{name:14} {precision:5} {row['parameters'] / 1e6:>8.1f} {row['training']:>8.2f} "
                f"{row['encoding']:>8.2f} {row['memory']:>8.0f} {row['work'] / 1e9:>8.1f} "
                f"{row['share']:>8.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
