"""Examples of a source, each once: batches for a whole pass, and the first ones to validate on."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dalle1.data.loader import Batch, Example, Prepare, prepare_sample, run_workers, stack
from dalle1.data.skipped import ShardRead, SkippedSample
from dalle1.data.sources.base import Source


class _ByKey(Dataset):
    """The examples that the keys of a source stand for, or what is skipped instead."""

    def __init__(self, source: Source, prepare: Prepare) -> None:
        self.source, self.prepare = source, prepare

    def __getitem__(self, key: Any) -> Example | SkippedSample | ShardRead:
        found = self.source.find(key)
        if isinstance(found, SkippedSample | ShardRead):
            return found
        return prepare_sample(self.prepare, found, random.Random(found.number))


def iter_batches(
    source: Source, keys: Iterable[Any], prepare: Prepare, batch_size: int, num_workers: int = 0
) -> Generator[Batch]:
    """Yield the examples at `keys` (see `Source.chunks`) once each, in their order.

    A batch has at most `batch_size` examples: fewer, or none, where samples are skipped.
    """
    rest = iter(keys)
    batches = iter(lambda: [*islice(rest, batch_size)], [])
    data = _ByKey(source, prepare)
    yield from run_workers(data, num_workers, batch_sampler=batches, collate_fn=_stack_found)


def _stack_found(found: Sequence[Example | SkippedSample | ShardRead]) -> Batch:
    skipped = [x for x in found if isinstance(x, SkippedSample)]
    shards = [x for x in found if isinstance(x, ShardRead)]
    examples = [x for x in found if not isinstance(x, SkippedSample | ShardRead)]
    return stack(examples, skipped, shards)


def iter_valid(
    source: Source, prepare: Prepare, skipped: list[SkippedSample] | None = None
) -> Iterator[Example]:
    """Yield the examples of `source.once()`; append the skipped samples to `skipped`."""
    for number, found in enumerate(source.once()):
        example = (
            found
            if isinstance(found, SkippedSample)
            else prepare_sample(prepare, found, random.Random(number))
        )
        if not isinstance(example, SkippedSample):
            yield example
        elif skipped is not None:
            skipped.append(example)


def first_examples(source: Source, prepare: Prepare, count: int) -> dict[str, Tensor]:
    """Return the first `count` examples as one batch, or as many as there are.

    Raises: ValueError where every sample is skipped.
    """
    skipped: list[SkippedSample] = []
    examples = list(islice(iter_valid(source, prepare, skipped), count))
    if not examples:
        last = f"{skipped[-1].where}: {skipped[-1].why}" if skipped else "the source is empty"
        raise ValueError(f"there is no usable sample to validate on; the last was skipped: {last}")
    if skipped:
        first = f"{skipped[0].where} ({skipped[0].cause}: {skipped[0].why})"
        print(f"Validating on {len(examples)} samples; skipped {len(skipped)}, the first: {first}")
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


MEASURED_CAPTIONS = 20_000
"""Number of captions, the first of the data, whose length is measured."""


def warn_of_cut_captions(captions: Sequence[str], limit: int, count: Callable[[str], int]) -> None:
    """Warn where captions have more tokens than a model reads.

    Args:
        captions: the first captions of the data.
        limit: number of tokens that the model reads.
        count: caption → number of its tokens.
    """
    lengths = [count(caption) for caption in captions[:MEASURED_CAPTIONS]]
    if cut := sum(length > limit for length in lengths):
        warnings.warn(
            f"{cut / len(lengths):.1%} of the first {len(lengths)} captions are cut: they have up "
            f"to {max(lengths)} tokens, and the model reads {limit}; raise --model.text-len",
            stacklevel=2,
        )


def first_captions(source: Source, count: int) -> list[str]:
    """Return a caption of each of the first `count` usable samples, to learn a vocabulary from."""
    examples = iter_valid(source.captions_only(), lambda s, rng: {"caption": s.caption(rng)})
    return [example["caption"] for example in islice(examples, count)]
