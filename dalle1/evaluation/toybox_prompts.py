"""The prompts of the Toybox evaluation, and how many candidates are generated for each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dalle1.toybox import Scene, is_held_out, is_style_held_out, sample_scene
from dalle1.toybox.captions import plain_caption
from dalle1.toybox.kinds import kind_of

SPLITS = {"heldout": "held-out", "train": "training"}
"""Splits of the pairs that prompts are made of, with the names that reports use."""
KINDS = ("one", "two", "count", "style")
"""Kinds of prompts; see `dalle1.toybox.kinds`."""
KIND_CYCLE = ("one", "two", "style", "one", "two", "count", "one", "style", "two", "one")
"""Order of the prompts' kinds, so that the first few prompts include all kinds."""
MAX_PROMPTS = 400  # of a split; there are no more held-out pairs for the prompts of one object
MAX_CANDIDATES_AT_ONCE = 128  # of several prompts together
MAX_PROMPTS_AT_ONCE = 32  # since the prompts of a batch share their random numbers


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, and the scene that it describes."""

    text: str
    scene: Scene
    kind: str
    split: str


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts whose candidates are generated together.

    Candidate i of all prompts of a batch uses the same random numbers.
    """

    prompts: list[Prompt]
    num_candidates: int
    seed: int


def choose_prompts(split: str, count: int, seed: int) -> list[Prompt]:
    """Choose `count` distinct plain prompts of one split, cycling through all kinds.

    A held-out prompt of the kind "style" has a held-out pair of style and noun, and no held-out
    pair of fill and noun; all other held-out prompts have a held-out pair of fill and noun.
    """
    if count > MAX_PROMPTS:
        raise ValueError(f"num_prompts is {count}, expected at most {MAX_PROMPTS}")
    rng = random.Random(f"evaluate {split} {seed}")
    chosen: dict[str, Prompt] = {}
    waiting: dict[str, list[Scene]] = {kind: [] for kind in (*KINDS, "other")}
    while len(chosen) < count:
        kind = KIND_CYCLE[len(chosen) % len(KIND_CYCLE)]
        while not waiting[kind]:
            scene = sample_scene(rng, "validation" if split == "train" else split)
            waiting[kind_of(scene)].append(scene)
        scene = waiting[kind].pop(0)
        text = plain_caption(scene)
        by_fill = any(is_held_out(*item.pair) for item in scene.items)
        by_style = scene.style is not None and is_style_held_out(scene.style, scene.items[0].noun)
        wanted = (by_style and not by_fill) if kind == "style" else by_fill
        if text not in chosen and (wanted or split == "train"):
            chosen[text] = Prompt(text=text, scene=scene, kind=kind, split=split)
    return list(chosen.values())


def candidates_of(index: int, num_prompts: Sequence[int], best_of: Sequence[int]) -> int:
    """Return the number of candidates for prompt `index` of a split."""
    return max((n for n, prompts in zip(best_of, num_prompts) if index < prompts), default=0)


def prompt_batches(
    num_prompts: Sequence[int], best_of: Sequence[int], seed: int
) -> Iterator[PromptBatch]:
    """Yield all prompts of both splits, grouped by their number of candidates."""
    rng = random.Random(f"draws {seed}")
    for split in SPLITS:
        groups: dict[int, list[Prompt]] = {}
        for index, prompt in enumerate(choose_prompts(split, max(num_prompts), seed)):
            count = candidates_of(index, num_prompts, best_of)
            groups.setdefault(count, []).append(prompt)
        for count, group in groups.items():
            size = max(1, min(MAX_PROMPTS_AT_ONCE, MAX_CANDIDATES_AT_ONCE // count))
            for start in range(0, len(group), size):
                yield PromptBatch(
                    prompts=group[start : start + size],
                    num_candidates=count,
                    seed=rng.getrandbits(31),
                )
