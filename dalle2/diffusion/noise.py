"""Random numbers that belong to a candidate, not to a batch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class CandidateNoise:
    """Standard normal noise of several candidates; each has its own stream.

    A stream depends on (seed, candidate, part) alone: candidate 7 is the same image alone and in
    any batch, on any device. Numbers come from the CPU's generator.
    """

    def __init__(
        self,
        seed: int,
        candidates: Iterable[int],
        shape: Sequence[int],
        part: str = "",
        device: str | torch.device = "cpu",
    ) -> None:
        """Open the streams.

        Args:
            shape: shape of one candidate's noise.
            part: name of what is sampled, such as "prior", so that parts share no noise.
        """
        seeds = [random.Random(f"{seed}/{c}/{part}").getrandbits(63) for c in candidates]
        self.streams = [torch.Generator().manual_seed(number) for number in seeds]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        """Return the next noise of every candidate: [C, *shape]."""
        parts = [torch.randn(self.shape, generator=stream) for stream in self.streams]
        return torch.stack(parts).to(self.device)
