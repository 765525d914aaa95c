"""The words of the Toybox world: its things, what they are made of, which pairs are kept back.

Everything else in the package is written against these tuples. Their order is part of the
data: `is_held_out` counts along it, so new words belong at the end.
"""

from __future__ import annotations

NOUNS: tuple[str, ...] = (
    "armchair", "teapot", "lamp", "mug", "clock", "handbag", "house", "car",
    "tree", "fish", "cat", "snail", "cube", "ball", "star", "heart",
    "boat", "bird", "mushroom", "guitar", "hat", "shoe", "rocket", "vase",
    "bell", "key", "umbrella", "butterfly", "crown", "moon", "cactus", "bottle",
)  # fmt: skip

COLOURS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple",
    "pink", "brown", "black", "white", "grey", "turquoise",
)  # fmt: skip

CONCEPTS: tuple[str, ...] = (
    "avocado", "watermelon", "strawberry", "kiwi", "lemon", "zebra",
    "tiger", "leopard", "brick", "checkerboard", "polka dot", "galaxy",
    "wood", "gold", "knitted", "rainbow", "candy cane",
)  # fmt: skip

FILLS: tuple[str, ...] = COLOURS + CONCEPTS

BACKGROUNDS: tuple[str, ...] = (
    "mint", "cream", "sky", "lavender", "peach", "grey", "rose", "sage",
)  # fmt: skip

SIZES: tuple[str, ...] = ("small", "medium", "large")

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

SPLITS: tuple[str, ...] = ("train", "validation", "heldout", "all")


def check_word(kind: str, word: object, known: tuple[str, ...]) -> None:
    """Raise a `ValueError` that lists the choices unless `word` is one of `known`."""
    if word not in known:
        raise ValueError(f"got {kind} {word!r}, expected one of {', '.join(known)}: pick one")


def is_held_out(fill: str, noun: str) -> bool:
    """Say whether the pair is kept out of training, so that a model must compose it unseen.

    A fixed tenth of all pairs, laid out as a diagonal pattern over the word lists: every fill
    and every noun loses about a tenth of its partners and keeps the rest. The avocado armchair
    is among them.
    """
    check_word("fill", fill, FILLS)
    check_word("noun", noun, NOUNS)
    row, column = FILLS.index(fill), NOUNS.index(noun)
    # 3 and 10 share no factor, so ten fills in a row hold out ten different sets of nouns;
    # `row // 10` shifts the next ten, and the constant puts the avocado armchair on the diagonal.
    return (column + 3 * row + 4 * (row // 10)) % 10 == 0
