"""A particle filter over candidates: after some rows, the likelier ones replace the others.

P prompts, C candidates of each, r rows of W codes that are sampled, N = W² codes.

Reranking chooses among whole images. Here candidates are weighted while they are sampled, by how
well their rows so far fit the prompt. Where few candidates hold most of the weight, they are
resampled in proportion to it: some are copied, others end. A copy has the random numbers of the
candidate that it replaces, so the two differ from the next code on. All C candidates of a prompt
depend on each other.

This is sequential Monte Carlo (Doucet & Johansen 2009): were weights resampled after every row, the
samples would be those of q(image) · exp(score of the rows) as C grows, q the distribution that is
sampled from, after guidance, temperature and filters. Here weights that do not differ enough, and
rows after the last resampling, do not count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from dalle1.clip import Clip
from dalle1.memory_errors import out_of_memory
from dalle1.sampling.batching import FitsInMemory, batched
from dalle1.sampling.decoding import UNKNOWN, DecodeState

THRESHOLD = 0.5
"""Share of C below which the effective number of candidates is resampled."""


class RowScore(Protocol):
    """Weights of unfinished images."""

    @property
    def compares(self) -> bool:
        """Whether it reads `DecodeState.gain`."""

    def __call__(self, state: DecodeState, rows: int) -> Tensor:
        """Return ln of the weight of each candidate's first r rows, [P, C]."""


class Resampler:
    """Decides after each row which candidates continue; one for each batch."""

    def __init__(self, score: RowScore, every: int, seed: int) -> None:
        """Resample after every `every` rows, where weights differ enough."""
        self.score, self.every, self.seed = score, every, seed
        self.start: Tensor | None = None  # scores when candidates were last resampled

    @property
    def compares(self) -> bool:
        """Whether the score reads `DecodeState.gain`."""
        return self.score.compares

    def __call__(self, state: DecodeState, rows: int) -> Tensor | None:
        """Return the candidate that each continues, [P, C]; None where all continue their own."""
        if rows % self.every:
            return None
        scores = self.score(state, rows).double().cpu()
        start = torch.zeros_like(scores) if self.start is None else self.start
        uniform = random.Random(f"{self.seed}/resample/{rows}").random()
        chosen = [resampled(w, uniform) for w in (scores - start).softmax(-1)]
        own = torch.arange(scores.shape[1])
        kept = torch.stack([own if c is None else c for c in chosen])
        is_new = torch.tensor([c is not None for c in chosen])[:, None]
        self.start = torch.where(is_new, scores.gather(1, kept), start)
        return None if kept.equal(own.expand_as(kept)) else kept


def sampled_whole(
    sample: Callable[[range, range], Tensor],
    prompts: range,
    candidates: range,
    fits: FitsInMemory,
    batch_size: int | None,
) -> Iterator[tuple[range, range, Tensor]]:
    """Return batches as `batched` does, each with all candidates of its prompts.

    Raises: ValueError where the candidates are split among processes, exceed `batch_size` or do
        not fit in memory.
    """
    count = len(candidates)
    if candidates.step > 1:
        raise ValueError(
            "resample compares all candidates of a prompt, expected one process; run it without "
            "torchrun"
        )
    if batch_size is not None and batch_size < count:
        raise ValueError(
            f"batch_size is {batch_size}, expected at least num_candidates, {count}: resample "
            "compares all candidates of a prompt"
        )

    if not fits(1, count):
        raise ValueError(
            f"num_candidates is {count}, expected fewer: resample compares all candidates of a "
            f"prompt, which need more than half of the free memory; set batch_size to {count} to "
            "try nevertheless"
        )

    def sample_all(rows: range, _: range) -> Tensor:
        try:
            return sample(rows, candidates)
        except (RuntimeError, MemoryError) as error:
            if len(rows) > 1 or not out_of_memory(error):
                raise
            raise ValueError(
                f"num_candidates is {count}, and memory is exhausted: resample compares all "
                "candidates of a prompt; use fewer"
            ) from error

    batches = batched(sample_all, prompts, range(1), lambda p, _: fits(p, count))
    return ((rows, candidates, codes) for rows, _, codes in batches)


def resampled(weights: Tensor, uniform: float) -> Tensor | None:
    """Choose C candidates in proportion to weights [C] that sum to 1; None if none is needed.

    Systematic resampling: candidate i is chosen ⌊C·w_i⌋ or ⌈C·w_i⌉ times, C·w_i on average over
    `uniform` in [0, 1). Who is chosen at all keeps its own position; copies fill the others.
    """
    count = len(weights)
    if 1 / weights.square().sum() >= THRESHOLD * count:
        return None
    points = (torch.arange(count, dtype=weights.dtype) + uniform) / count
    chosen = torch.searchsorted(weights.cumsum(0), points, right=True).clamp_max(count - 1)
    copies = torch.bincount(chosen, minlength=count)
    found = torch.arange(count)
    found[copies == 0] = found.repeat_interleave((copies - 1).clamp_min(0))
    return found


@dataclass(frozen=True)
class ClipRowScore:
    """CLIP's learned scale times the similarity of prompt and unfinished image.

    Missing codes are filled by the candidate's most frequent one, mostly of the background.
    """

    clip: Clip
    prompts: Sequence[str]
    decode: Callable[[Tensor], list[Image.Image]]
    """Codes [C, W, W] → images."""
    compares: bool = False

    def __call__(self, state: DecodeState, rows: int) -> Tensor:
        width = state.model.config.grid_size
        grids = state.codes.unflatten(2, (width, width))
        frequent = grids[:, :, :rows].flatten(2).mode(-1).values
        grids = torch.where(grids == UNKNOWN, frequent[..., None, None], grids)
        scale = float(self.clip.model.logit_scale.exp())
        scores = [self.clip.score(p, self.decode(g)) for p, g in zip(self.prompts, grids)]
        return scale * torch.stack(scores)


class LikelihoodRowScore:
    """Nats that the prompt saves: ln p(rows | prompt) − ln p(rows), as computed in sampling.

    The second is that of the empty caption, or of the negative prompt.
    """

    compares = True

    def __call__(self, state: DecodeState, rows: int) -> Tensor:
        assert state.gain is not None
        return state.gain
