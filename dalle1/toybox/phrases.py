"""The phrases that captions are composed of.

In a phrase {n} is the noun, in whichever number, {bare} the fill, {f} the fill with its article and
{many} its plural. Each names the fill literally, and each is true.
"""

from __future__ import annotations

NUMBERS = {2: "two", 3: "three", 4: "four"}

# Synonyms, used in a small share of the captions.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "armchair": ("chair",),
    "mug": ("cup",),
    "handbag": ("bag", "purse"),
    "cat": ("kitten", "kitty"),
    "dog": ("puppy",),
    "rabbit": ("bunny",),
    "ball": ("sphere",),
    "boat": ("sailing boat",),
    "airplane": ("plane", "aeroplane"),
    "dinosaur": ("dino",),
    "train": ("locomotive",),
    "shoe": ("sneaker",),
    "clock": ("alarm clock",),
    "grey": ("gray",),
    "ladybird": ("ladybug",),
    "checkerboard": ("chessboard",),
    "turquoise": ("teal",),
    "purple": ("violet",),
}
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
}

PLURALS = {"fish": "fish", "cactus": "cactuses"}

FOOD = ("{n} in the shape of {f}", "{n} in the shape of {f}", "{n} that looks like {f}",
        "{n} made of {bare}", "{n} made of {many}", "{bare}-style {n}", "{bare}-shaped {n}",
        "{n}, {bare} style", "{n} in {bare} style", "{n} imitating {f}", "{n} inspired by {f}",
        "{n} made out of {f}")  # fmt: skip
_STRIPED = ("{n} that looks like {f}", "{n} with {bare} stripes", "{bare}-striped {n}",
            "{bare}-patterned {n}", "{bare}-style {n}", "{n}, {bare} style")  # fmt: skip
_SPOTTED = ("{n} that looks like {f}", "{n} with {bare} spots", "{bare}-spotted {n}",
            "{bare}-patterned {n}", "{bare}-style {n}", "{n}, {bare} style")  # fmt: skip
_PATTERN = ("{n} with a {bare} pattern", "{bare}-patterned {n}", "{n} covered in a {bare} pattern",
            "{n}, {bare} style")  # fmt: skip
_STUFF = ("{n} made of {bare}", "{n} made out of {bare}", "{n} made from {bare}")

COLOUR_PHRASES = ("{n} that is {bare}", "{n} in {bare}", "{n} of {bare} colour",
                  "{n} of {bare} color", "{bare}-coloured {n}", "{bare}-colored {n}",
                  "{n}, {bare}")  # fmt: skip
PHRASES: dict[str, tuple[str, ...]] = {
    "avocado": FOOD,
    "watermelon": FOOD,
    "strawberry": FOOD,
    "kiwi": FOOD,
    "lemon": FOOD,
    "pineapple": FOOD,
    "pizza": FOOD,
    "zebra": _STRIPED,
    "tiger": _STRIPED,
    "leopard": _SPOTTED,
    "ladybird": _SPOTTED,
    "brick": ("{n} made of bricks", "{n} built of brick", "{bare}-patterned {n}"),
    "checkerboard": (*_PATTERN, "{n} that looks like {f}", "{n} with a checkerboard print"),
    "polka dot": (*_PATTERN, "{n} with polka dots", "{n} covered in polka dots"),
    "galaxy": (*_PATTERN, "{n} that looks like {f}", "galaxy-style {n}", "{n} made of galaxies"),
    "wood": (*_STUFF, "wooden {n}", "{n} carved out of wood"),
    "gold": (*_STUFF, "golden {n}", "{n} cast in gold"),
    "silver": (*_STUFF, "{n} cast in silver", "shiny silver {n}"),
    "marble": (*_STUFF, "{n} carved out of marble", "{n} carved from marble"),
    "chocolate": (*_STUFF, "{n} cast in chocolate", "{n} made of chocolate bars"),
    "ice": (*_STUFF, "{n} carved out of ice", "frozen {n} made of ice"),
    "denim": (*_STUFF, "{n} covered in denim", "{n} sewn from denim"),
    "lava": (*_STUFF, "{n} made of hot lava", "glowing {bare} {n}"),
    "honeycomb": (*_STUFF, "{n} with a honeycomb pattern", "{n} that looks like {f}"),
    "peacock": ("{n} with peacock feathers", "{n} covered in peacock feathers",
                "{n} that looks like {f}", "{bare}-patterned {n}", "{bare}-style {n}"),
    "knitted": ("{n} made of knitted wool", "{n} that is knitted", "wool-knitted {n}"),
    "rainbow": ("{n} with rainbow stripes", "rainbow-striped {n}", "{n} that looks like {f}",
                "{n} in rainbow colours", "{n} in rainbow colors", "{n} made of rainbows"),
    "candy cane": ("{n} with candy cane stripes", "{n} that looks like {f}", "{n} made of {bare}s",
                   "candy cane-striped {n}"),
}  # fmt: skip

# Phrases around the object; {t} is its noun phrase. No image here is a photo or
# a painting, but people ask for them.
WRAPPERS = ("a picture of {t}", "a drawing of {t}", "an image of {t}", "an illustration of {t}",
            "a photo of {t}", "a painting of {t}", "a cartoon of {t}", "draw {t}", "show me {t}",
            "please draw {t}", "i want to see {t}")  # fmt: skip

STYLE_PHRASES: dict[str, tuple[str, ...]] = {
    "sketch": ("a sketch of {t}", "a sketch of {t}", "a pencil sketch of {t}",
               "a pencil drawing of {t}", "{t} drawn in pencil", "{t}, pencil sketch",
               "{t} as a sketch", "a black and white sketch of {t}"),
    "pixel art": ("pixel art of {t}", "pixel art of {t}", "{t} in pixel art", "{t}, pixel art",
                  "{t} as pixel art", "{t} in the style of pixel art", "{t} made of pixels"),
    "neon": ("a neon sign of {t}", "a neon sign of {t}", "{t} as a neon sign",
             "{t} made of neon lights", "{t}, neon sign", "a glowing neon sign of {t}",
             "a neon sign in the shape of {t}"),
    "stained glass": ("a stained-glass window of {t}", "a stained glass window of {t}",
                      "{t} in stained glass", "{t} as a stained-glass window",
                      "{t}, stained glass", "a stained-glass window with {t}"),
}  # fmt: skip
# Before the noun, as in "a pixel art cat".
STYLE_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "sketch": ("sketched", "hand-drawn"),
    "pixel art": ("pixel art", "pixel art", "pixelated"),
    "neon": ("neon", "glowing neon"),
    "stained glass": ("stained-glass", "stained glass"),
}
