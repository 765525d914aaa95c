"""Scenes: what a Toybox picture shows, decided before anything is drawn.

A scene is the truth behind a picture. Captions are made from it, so they cannot be false, and an
evaluation can compare what was asked for with what was drawn.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

from dalle1.data.toybox.vocabulary import (
    BACKGROUNDS,
    FILLS,
    NOUNS,
    RELATIONS,
    SIZES,
    SPLITS,
    check_word,
    is_held_out,
)

Pair = tuple[str, str]

HELD_OUT: tuple[Pair, ...] = tuple((f, n) for f in FILLS for n in NOUNS if is_held_out(f, n))
TRAINING: tuple[Pair, ...] = tuple((f, n) for f in FILLS for n in NOUNS if not is_held_out(f, n))

# Extents in picture widths. The three ranges of one kind of scene never touch, so that "small"
# and "large" are visible facts.
_ALONE = {"small": (0.30, 0.38), "medium": (0.58, 0.70), "large": (0.76, 0.85)}
_PAIRED = {"small": (0.24, 0.29), "medium": (0.38, 0.43), "large": (0.50, 0.55)}
_COUNTED = {2: (0.38, 0.44), 3: (0.27, 0.30)}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing in a scene.

    `x` and `y` are its box's centre and `extent` the box's side, all in picture widths; `tilt` is
    in degrees, anticlockwise; `seed` places the texture.
    """

    noun: str
    fill: str
    size: str = "medium"
    x: float = 0.5
    y: float = 0.5
    extent: float = 0.7
    tilt: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("noun", self.noun, NOUNS)
        check_word("fill", self.fill, FILLS)
        check_word("size", self.size, SIZES)
        if not 0 < self.extent <= 1:
            raise ValueError(
                f"got extent {self.extent}, expected more than 0 and at most 1: "
                "it is the box's side in picture widths"
            )

    @property
    def pair(self) -> Pair:
        """The (fill, noun) pair, which decides the item's split."""
        return self.fill, self.noun


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The things in one picture, first to last, and the colour behind them.

    `relation` says where the first item is, seen from the second. Without a relation the scene is
    a single thing, or several alike that can be counted.
    """

    items: tuple[Item, ...]
    relation: str | None = None
    background: str = "cream"

    def __post_init__(self) -> None:
        check_word("background", self.background, BACKGROUNDS)
        if not self.items:
            raise ValueError("got no items, expected at least one: a scene shows something")
        if self.relation is not None:
            check_word("relation", self.relation, RELATIONS)
            if len(self.items) != 2:
                raise ValueError(
                    f"got a relation with {len(self.items)} items, expected 2: "
                    "leave relation None otherwise"
                )
        elif len({item.pair for item in self.items}) > 1:
            raise ValueError(
                "got different items without a relation, expected items alike: "
                f"set relation to one of {', '.join(RELATIONS)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the scene as plain values that JSON can hold."""
        values = asdict(self)
        values["items"] = [dict(item) for item in values["items"]]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scene:
        """Rebuild the scene that `to_dict` wrote."""
        items = tuple(Item(**item) for item in values["items"])
        return cls(items=items, relation=values["relation"], background=values["background"])


def sample_scene(rng: random.Random, split: str) -> Scene:
    """Draw a random scene of a split.

    "train" and "validation" show only training pairs, "heldout" at least one held-out pair in
    every scene, "all" any pair. About 65% of the scenes are one thing, 20% two things in a
    relation, 15% two or three alike; held-out scenes are mostly one thing.
    """
    check_word("split", split, SPLITS)
    pairs = {"heldout": HELD_OUT, "all": HELD_OUT + TRAINING}.get(split, TRAINING)
    kind, background = rng.random(), rng.choice(BACKGROUNDS)
    single, related = (0.8, 0.9) if split == "heldout" else (0.65, 0.85)
    first = rng.choice(pairs)
    if kind < single:
        return Scene(items=(_alone(rng, first),), background=background)
    if kind < related:
        others = TRAINING if split == "heldout" else pairs
        second = rng.choice(others)
        while second[1] == first[1] or second[0] == first[0]:
            second = rng.choice(others)
        return _related(rng, first, second, background)
    return Scene(items=_counted(rng, first), background=background)


def _item(
    rng: random.Random, pair: Pair, size: str, x: float, y: float, extent: float, tilt: float
) -> Item:
    return Item(
        noun=pair[1],
        fill=pair[0],
        size=size,
        x=round(x, 4),
        y=round(y, 4),
        extent=round(extent, 4),
        tilt=round(rng.uniform(-tilt, tilt), 2) if rng.random() < 0.5 else 0.0,
        seed=rng.randrange(2**16),
    )


def _alone(rng: random.Random, pair: Pair) -> Item:
    size = rng.choices(SIZES, (0.08, 0.57, 0.35))[0]
    extent = rng.uniform(*_ALONE[size])
    room = max(0.0, min(0.06, (0.97 - extent) / 2))
    x, y = 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room)
    return _item(rng, pair, size, x, y, extent, tilt=8)


def _related(rng: random.Random, first: Pair, second: Pair, background: str) -> Scene:
    relation = rng.choice(RELATIONS)
    # Two large things would overlap, so one of the two stays medium or small.
    sizes = rng.choice(
        (("medium", "medium"), ("medium", "medium"), ("small", "large"), ("large", "small"),
         ("small", "medium"), ("medium", "small"))
    )  # fmt: skip
    extents = [rng.uniform(*_PAIRED[size]) for size in sizes]
    free = 0.94 - sum(extents)
    before, between = free * rng.uniform(0.15, 0.35), free * rng.uniform(0.2, 0.45)
    forward = relation in ("left of", "above")
    near, far = extents if forward else extents[::-1]
    along = [0.03 + before + near / 2, 0.03 + before + near + between + far / 2]
    if not forward:
        along.reverse()
    across = [0.5 + rng.uniform(-0.05, 0.05) for _ in range(2)]
    upright = relation in ("above", "below")
    places = list(zip(across, along) if upright else zip(along, across))
    items = tuple(
        _item(rng, pair, size, x, y, extent, tilt=6)
        for pair, size, (x, y), extent in zip((first, second), sizes, places, extents)
    )
    return Scene(items=items, relation=relation, background=background)


def _counted(rng: random.Random, pair: Pair) -> tuple[Item, ...]:
    count = rng.choice((2, 3))
    extent = rng.uniform(*_COUNTED[count])
    layouts: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
        2: (((0.27, 0.5), (0.73, 0.5)), ((0.27, 0.27), (0.73, 0.73)), ((0.73, 0.27), (0.27, 0.73))),
        3: (((0.18, 0.5), (0.5, 0.5), (0.82, 0.5)), ((0.5, 0.27), (0.27, 0.71), (0.73, 0.71)),
            ((0.27, 0.29), (0.73, 0.29), (0.5, 0.72))),
    }  # fmt: skip
    return tuple(
        _item(rng, pair, "medium", x + rng.uniform(-0.015, 0.015), y + rng.uniform(-0.03, 0.03),
              extent, tilt=8)
        for x, y in rng.choice(layouts[count])
    )  # fmt: skip
