"""The words of Toybox: nouns, fills and styles, and which pairs are held out.

The order of the tuples is part of the data: `is_held_out` and `is_style_held_out` depend on it,
so new words belong at the end.
"""

from __future__ import annotations

NOUNS: tuple[str, ...] = (
    "armchair", "teapot", "lamp", "mug", "clock", "handbag", "house", "car",
    "tree", "fish", "cat", "snail", "cube", "ball", "star", "heart",
    "boat", "bird", "mushroom", "guitar", "hat", "shoe", "rocket", "vase",
    "bell", "key", "umbrella", "butterfly", "crown", "moon", "cactus", "bottle",
    "dog", "rabbit", "elephant", "penguin", "owl", "turtle", "whale", "dinosaur",
    "airplane", "train", "robot", "castle",
)  # fmt: skip

COLOURS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple",
    "pink", "brown", "black", "white", "grey", "turquoise",
)  # fmt: skip

CONCEPTS: tuple[str, ...] = (
    "avocado", "watermelon", "strawberry", "kiwi", "lemon", "zebra",
    "tiger", "leopard", "brick", "checkerboard", "polka dot", "galaxy",
    "wood", "gold", "knitted", "rainbow", "candy cane",
    "pineapple", "chocolate", "marble", "denim", "ice", "ladybird",
    "peacock", "lava", "honeycomb", "silver", "pizza",
)  # fmt: skip

FILLS: tuple[str, ...] = COLOURS + CONCEPTS

STYLES: tuple[str, ...] = ("sketch", "pixel art", "neon", "stained glass")

# The fills that are recognisable in a style: pencil is grey, and a neon sign of marble only hints
# at it. Captions often omit the other fills, and no evaluation counts them.
FILL_SURVIVES: dict[str, frozenset[str]] = {
    "sketch": frozenset(),
    "pixel art": frozenset(FILLS),
    "neon": frozenset(COLOURS) - {"brown", "black", "grey"},
    "stained glass": frozenset(FILLS),
}

BACKGROUNDS: tuple[str, ...] = (
    "mint", "cream", "sky", "lavender", "peach", "grey", "rose", "sage",
)  # fmt: skip

SIZES: tuple[str, ...] = ("small", "medium", "large")

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS: tuple[str, ...] = tuple(OPPOSITE)

SPLITS: tuple[str, ...] = ("train", "validation", "heldout", "all")


def check_word(kind: str, word: object, known: tuple[str, ...]) -> None:
    """Raise a `ValueError` that lists the choices unless `word` is one of `known`."""
    if word not in known:
        raise ValueError(f"got {kind} {word!r}, expected one of {', '.join(known)}: pick one")


def is_held_out(fill: str, noun: str) -> bool:
    """Whether the pair is held out of training, so that a model has to compose it.

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


def is_style_held_out(style: str, noun: str) -> bool:
    """Whether training has no image of the noun in that style, with any fill.

    A tenth of all such pairs, on a diagonal again; the neon fish is among them.
    """
    check_word("style", style, STYLES)
    check_word("noun", noun, NOUNS)
    return (NOUNS.index(noun) + 3 * STYLES.index(style) + 5) % 10 == 0
