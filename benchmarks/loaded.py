"""Measure sampling and training beside other busy processes: at most 3 times the time alone.

    python benchmarks/loaded.py

Each runs in a process of its own, set up as the commands set up theirs, alone and beside as many
busy processes as there are processors. Sampling: 4 rows of codes by the bundled model. Training:
updates of `toy-128` with batches of 4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dalle1.commands.idle_processors import IdleProcessors
from dalle1.console import prepare_process

LONGEST = 600
"""Seconds after which a measurement fails, and a busy process ends by itself."""
BUSY = f"import time; end = time.monotonic() + {LONGEST}\nwhile time.monotonic() < end: pass"
ROWS = 4


def sampling(candidates: int) -> Callable[[], object]:
    """Return a call that samples the last rows of codes."""
    import torch

    from dalle1 import DallE
    from dalle1.sampling.decoding import UNKNOWN, candidate_uniforms, generate

    model = DallE.from_pretrained(clip="none")
    text = model.encode_prompt("a red star")[None]
    config = model.transformer.config
    known = torch.full((config.image_len,), UNKNOWN)
    known[: -ROWS * config.grid_size] = 0
    uniforms = candidate_uniforms(0, range(candidates), config.image_len)
    return partial(generate, model.transformer, text, uniforms, known_codes=known)


def training() -> Callable[[], object]:
    """Return a call that updates a model."""
    import torch

    from dalle1.model.transformer import Transformer, TransformerConfig
    from dalle1.tasks.transformer import TRANSFORMER_PRESETS

    config = TransformerConfig(**vars(TRANSFORMER_PRESETS["toy-128"].model))
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters())
    text = torch.randint(config.text_vocab, (4, config.text_len))
    codes = torch.randint(config.codebook_size, (4, config.grid_size, config.grid_size))

    def update() -> None:
        of_text, of_codes = model.losses(text, codes)
        (of_text.mean() + of_codes.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


WORK: dict[str, Callable[[], Callable[[], object]]] = {
    "sampling, 1 candidate": partial(sampling, 1),
    "sampling, 16 candidates": partial(sampling, 16),
    "training": training,
}


def measure(name: str, repeats: int) -> dict[str, float]:
    """Measure one kind of work in this process: the median seconds, and the number of threads."""
    prepare_process()
    idle = IdleProcessors()
    import torch
    from measuring import seconds

    step = WORK[name]()
    if name != "training":  # a training is long, and the use of processors changes
        torch.set_num_threads(idle.threads())
    return {"seconds": seconds(step, repeats), "threads": torch.get_num_threads()}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many other processes busy."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        time.sleep(0.2 if started else 0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def in_fresh_process(name: str, repeats: int) -> dict[str, float]:
    """Measure in a process of its own; subprocess.TimeoutExpired where it takes too long."""
    words = [sys.executable, str(Path(__file__)), "--here", name, "--repeats", str(repeats)]
    run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=LONGEST)
    return json.loads(run.stdout.splitlines()[-1])


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="other busy processes")
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many is taken")
    parser.add_argument("--work", nargs="+", choices=WORK, default=[*WORK])
    parser.add_argument("--here", choices=WORK, help="measure this, in this process")
    options = parser.parse_args(args)
    if options.here:
        print(json.dumps(measure(options.here, options.repeats)))
        return
    print(f"{'':24} {'alone':>9} {'threads':>8} {'loaded':>9} {'threads':>8} {'ratio':>6}")
    for name in options.work:
        alone = in_fresh_process(name, options.repeats)
        with busy(options.busy):
            loaded = in_fresh_process(name, options.repeats)
        cells = [f"{r['seconds']:7.2f} s {r['threads']:8.0f}" for r in (alone, loaded)]
        print(
            f"{name:24} {' '.join(cells)} {loaded['seconds'] / alone['seconds']:6.1f}", flush=True
        )


if __name__ == "__main__":
    main()
