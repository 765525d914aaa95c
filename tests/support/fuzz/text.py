"""Fuzzed text: prompts and the values of flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.world import World

Choose = Callable[[st.SearchStrategy[Any]], Any]

ANY_TEXT = st.text(st.characters(codec=None), max_size=60)
"""Any characters, half surrogates and controls too; but NUL, which no command line can hold."""

PROMPTS = st.one_of(
    ANY_TEXT,
    st.text("\u0301\u200d\u202e\ufeff\u00ad🏽👩 a\n\t\r\\'\"<>&%$`", max_size=40),
    st.sampled_from(
        ["--", "-1", "--out", "a" * 5000, "é" * 300, "../../x", "/etc", "~", "&amp;" * 99]
    ),
    st.text("ab ", min_size=1, max_size=3000),
)

WORDS = (
    *("", " ", "-1", "0", "1", "2", "1e400", "-1e400", "nan", "inf", "-inf", "1.5", "0x10", "None"),
    *("1_0", "1e3", "٣", "½", "True", "[]", "{}", "a b", "--", "9" * 400, "2147483648", "1e-400"),
    *(str(2**63), str(-(2**63) - 1), "/dev/null", "/", ".", "..", "\ud800", "~nobody/x", "a/../b"),
)
VALUES = st.one_of(
    st.sampled_from(WORDS),
    st.floats().map(str),
    st.integers(-3, 40).map(str),
    ANY_TEXT.map(lambda text: text.replace("\0", "")),
)
"""Values of flags."""

COSTLY = {
    "num-candidates", "num-images", "batch-size", "image-size", "size", "text-len", "vocab",
    "num-workers", "bootstrap", "steps", "prior-steps", "prior-samples", "shown", "limit", "crops",
    "captions", "shard-size", "images", "num-prompts", "best-of", "count", "data", "threads",
}  # fmt: skip
"""Flags whose large values are honest work: they get numbers below 40, or nonsense."""


def prompts(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Sample images for any text."""
    words = ["sample", "--model", str(world.model), "--out", str(scratch / "out")]
    words += ["--num-candidates", "2", "--num-images", "1", "--device", "cpu"]
    if choose(st.booleans()):
        file = scratch / "in" / "prompts.txt"
        text = choose(st.one_of(st.binary(max_size=60), PROMPTS.map(encode)))
        file.write_bytes(text)
        words += ["--prompts-file", str(file)]
    words += ["--rerank", choose(st.sampled_from(["clip", "likelihood", "none"]))]
    if choose(st.booleans()):
        return [*words, "--", *(without_nul(x) for x in choose(st.lists(PROMPTS, max_size=3)))]
    return [*words, without_nul(choose(PROMPTS))]


def encode(text: str) -> bytes:
    """Return the bytes of any text."""
    return text.encode("utf-8", "surrogatepass")


def without_nul(text: str) -> str:
    """Return a text as a command line can hold it."""
    return text.replace("\0", "")


FLAGS = {
    "sample": "num-candidates num-images rerank seed temperature top-k top-p typical guidance clip "
    "batch-size precision keep-rows device preview json plain prompts-file mask",
    "unclip": "num-candidates num-images seed guidance steps sampler eta embedding prior-steps "
    "prior-samples prior-guidance batch-size keep-rows temperature top-k rerank",
    "check": "size text-len limit shown vocab captions min-side max-aspect min-caption max-caption "
    "max-bad-fraction clean-captions",
    "encode": "crops image-size captions batch-size shard-size seed allow-upscale min-side "
    "max-aspect min-caption max-caption max-bad-fraction",
    "rank": "num-images batch-size device precision clip",
    "filter": "min-similarity batch-size device num-workers",
    "compress": "batch-size coder captions text-only device",
    "bits": "pairs images batch-size",
    "dvae": "images temperature precision",
    "toybox": "count size seed shard-size",
    "plan": "gpus memory width depth heads images steps budget",
    "train": "model.width model.depth model.heads model.text-len learning-rate batch-size prompts "
    "accumulate clip-norm beta1 beta2 weight-decay warmup-steps schedule optimizer ema seed "
    "log-every save-every validate-every keep caption-dropout device precision data",
}
"""Name of a command → flags that get random values."""


def base_command(name: str, world: World, scratch: Path) -> list[str]:
    """Return a command that succeeds."""
    model, images, out = str(world.model), str(world.images), str(scratch / "out")
    on = ["--device", "cpu", "--out", out]
    one = ["--num-candidates", "1", "--num-images", "1", *on]
    clip = ["--clip", f"{model}/clip", *on]
    few = ["--steps", "2", "--prior-steps", "2", "--prior-samples", "1", *one]
    data = ["--data", images, *on]
    return {
        "sample": lambda: ["sample", "a red cube", "--model", model, *one],
        "unclip": lambda: ["sample", "a red cube", "--model", str(world.unclip), *few],
        "check": lambda: ["check", images, "--num-workers", "0", "--out", out],
        "encode": lambda: ["encode", "--dvae", model, *data, "--num-workers", "0"],
        "rank": lambda: ["rank", "a red cube", images, *clip],
        "filter": lambda: ["filter", "--data", str(world.shard), *clip, "--num-workers", "1"],
        "compress": lambda: ["compress", images, "--model", model, *on[:-1], out + "/a.d1c"],
        "bits": lambda: ["evaluate", "bits", "--model", model, *data],
        "dvae": lambda: ["evaluate", "dvae", "--model", model, *data, "--precision", "fp32"],
        "toybox": lambda: ["toybox", "--count", "2", "--out", out],
        "plan": lambda: ["plan"],
        "train": lambda: [*world.training_command(world.images), "--steps", "1", "--out", out],
    }[name]()


def flags(choose: Choose, world: World, scratch: Path) -> list[str]:
    """Run a command with one to three flags of random values."""
    command = choose(st.sampled_from([*FLAGS]))
    words = base_command(command, world, scratch)
    for _ in range(choose(st.integers(1, 3))):
        name = choose(st.sampled_from([*FLAGS[command].split(), "nonsense"]))
        value = choose(VALUES)
        if name in COSTLY and is_large(value):
            value = "-" + value
        words += choose(
            st.sampled_from([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]])
        )
    return words


def is_large(value: str) -> bool:
    """Whether a flag may take a value for a large number."""
    try:
        return abs(float(value)) > 40 and float(value) > 0
    except ValueError:
        return False
