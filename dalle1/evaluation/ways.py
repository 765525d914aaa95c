"""Compare models and ways of sampling: each row of the table samples the same Toybox prompts.

    dalle1 evaluate ways --models runs/ldm runs/imagen runs/sdxl --kinds two
    dalle1 evaluate ways --ways default guidance=2 guidance=2,weight=1.5 resample=likelihood

A way is "default", the model's own defaults, or options of sampling: NAME=VALUE, separated by
commas. Two more options depend on the prompt: `weight=W` weights the fills of its objects, and
`negative=swapped` leads away from the same prompt with its two fills exchanged.

Shares are means over all candidates. Their intervals count prompts, not candidates: those of a
prompt depend on each other. A difference is that of the same prompts to the first row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dalle1.clip import Clip
from dalle1.console import bar
from dalle1.devices import pick_device
from dalle1.evaluation.classifier import BUNDLED, load_classifier
from dalle1.evaluation.report import Scores
from dalle1.evaluation.toybox_prompts import MAX_PROMPTS, SPLITS, Prompt, choose_prompts
from dalle1.evaluation.variants import Measured, Variant, measured
from dalle1.sampling.generation import GenerationConfig
from dalle2.loading import load_pipeline
from dalle2.options import UnclipOptions

DEFAULT = "default"
OPTIONS = [
    *(f.name for f in fields(GenerationConfig)),
    *(f.name for f in fields(UnclipOptions) if f.name != "upsampler_steps"),
    *("seed", "weight", "negative"),
]
"""Names of the options of a way; images are classified before they are upsampled."""
SHARES = ("correct", "pairs", "best")
"""Columns with an interval and a difference to the first row."""


@dataclass(frozen=True, kw_only=True)
class WaysOptions:
    """Compare models, and ways of sampling from them, on the same Toybox prompts."""

    models: tuple[str, ...] = ("bundled",)
    """Folders or names of models of either kind; a row for each of --ways."""
    ways: tuple[str, ...] = (DEFAULT,)
    """Options of sampling: default, or NAME=VALUE,NAME=VALUE such as guidance=2,resample=clip. Also
    weight=W of the fills, and negative=swapped, a negative prompt with exchanged fills."""
    kinds: tuple[Literal["one", "two", "count", "style"], ...] = ("two",)
    """Kinds of prompts: one object, two in a relation, several alike, styles."""
    num_prompts: int = 30
    """Prompts of held-out pairs, and as many of training pairs; fewer where there are no more."""
    num_candidates: int = 4
    """Candidates of each prompt."""
    seed: int = 0
    """Random seed of the prompts and of sampling."""
    clip: str = "bundled"
    """CLIP that selects the best candidate, and measures how they differ."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ... auto is cuda, else mps, else cpu."""
    classifier: Path | None = None
    """File or training folder of the Toybox classifier; the bundled classifier by default."""
    out: Path = Path("runs/ways")
    """Folder for ways.json."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("models", "ways", "kinds"):
            if not (values := getattr(self, name)):
                raise ValueError(f"{name} is empty, expected at least one")
            if len({*values}) < len(values):
                raise ValueError(f"{name} is {' '.join(values)}, expected different ones")
        for way in self.ways:
            options = parse_way(way)
            if "negative" in options and self.kinds != ("two",):
                raise ValueError(f"way is {way}, expected --kinds two: it exchanges two fills")


def parse_way(way: str) -> dict[str, Any]:
    """Return the options of a way; ValueError for what has another form."""
    found: dict[str, Any] = {}
    for part in way.split(",") if way != DEFAULT else ():
        name, is_option, value = part.partition("=")
        if not is_option or not name.isidentifier() or not value:
            raise ValueError(f"way is {way!r}, expected default or NAME=VALUE,NAME=VALUE")
        if name not in OPTIONS:
            known = ", ".join(map(repr, OPTIONS))  # quoted, since they are no flags
            raise ValueError(f"way is {way!r}, expected NAME=VALUE, where NAME is one of {known}")
        found[name] = value
        for kind in (float, int):  # the last that reads it
            try:
                found[name] = kind(value)
            except ValueError:
                break
    if not isinstance(found.get("weight", 0), int | float):
        raise ValueError(f"weight is {found['weight']!r}, expected a number such as 1.5")
    if found.get("negative", "swapped") != "swapped":
        raise ValueError(f"negative is {found['negative']!r}, expected swapped")
    if not isinstance(found.get("seed", 0), int):
        raise ValueError(f"seed is {found['seed']!r}, expected a whole number")
    return found


def weighted_fills(prompt: Prompt, weight: float) -> str:
    """Return a prompt whose fills have a weight: a (red:1.5) star."""
    return _replaced_fills(prompt, lambda fill: f"({fill}:{weight:g})")


def swapped_fills(prompt: Prompt) -> str:
    """Return a prompt with its two fills exchanged."""
    fills = list(dict.fromkeys(item.fill for item in prompt.scene.items))
    other = dict(zip(fills, reversed(fills), strict=True))
    return _replaced_fills(prompt, other.__getitem__)


def _replaced_fills(prompt: Prompt, new: Callable[[str], str]) -> str:
    fills = sorted({item.fill for item in prompt.scene.items}, key=len, reverse=True)
    pattern = r"\b(" + "|".join(map(re.escape, fills)) + r")\b"
    return re.sub(pattern, lambda match: new(match[0]), prompt.text)


def rows_of(options: WaysOptions) -> Iterator[Variant]:
    """Yield a row for each model and way."""
    for name in options.models:
        model = load_pipeline(name, device=options.device)
        for way in options.ways:
            how = parse_way(way)
            weight, negative = how.pop("weight", None), how.pop("negative", None)
            label = " ".join([name] * (len(options.models) > 1) + [way] * (len(options.ways) > 1))
            rewrite = None if weight is None else lambda p, w=weight: weighted_fills(p, w)
            yield Variant(
                name=label or way,
                model=model,
                how=how if weight is None else {**how, "weighted": True},
                rewrite=rewrite,  # type: ignore[arg-type]
                negative=swapped_fills if negative else None,
            )


def chosen_prompts(options: WaysOptions) -> list[Prompt]:
    """Return the prompts of the kinds, of both splits."""
    found = []
    for split in SPLITS:
        prompts = choose_prompts(split, MAX_PROMPTS, options.seed)
        found += [p for p in prompts if p.kind in options.kinds][: options.num_prompts]
    return found


def evaluate_ways(options: WaysOptions) -> Scores:
    """Yield `ROW/SHARE`, its margin, and its difference to the first row with a margin.

    Margins are half of the 95 % interval.
    """
    classifier = load_classifier(options.classifier or BUNDLED, pick_device(options.device))
    prompts, rows, clip = chosen_prompts(options), [*rows_of(options)], load_clip(options)
    for row in rows:
        check_row(row, prompts[0], options.num_candidates)
    yield "prompts", len(prompts)
    first: dict[str, np.ndarray] = {}
    with bar(total=len(rows) * len(prompts), unit="prompt") as progress:
        for row in rows:
            results: list[Measured] = []
            number, seed = options.num_candidates, options.seed
            for result in measured(row, prompts, classifier, clip, number, seed):
                results.append(result)
                progress.update()
            values = shares(results)
            first = first or values
            for name in SHARES:
                yield f"{row.name}/{name}", float(np.nanmean(values[name]))
                yield f"{row.name}/{name}/margin", margin(values[name])
                difference = values[name] - first[name]
                yield f"{row.name}/{name}/difference", float(np.nanmean(difference))
                yield f"{row.name}/{name}/difference/margin", margin(difference)
            yield f"{row.name}/diversity", float(np.mean([r.diversity for r in results]))


def check_row(row: Variant, prompt: Prompt, number: int) -> None:
    """Raise ValueError for options that the model does not have, before the work."""
    text = row.rewrite(prompt) if row.rewrite else prompt.text
    negative = {"negative_prompt": row.negative(prompt)} if row.negative else {}
    try:
        row.model.sample([text], **{"num_candidates": number, **row.how, **negative})
    except TypeError as error:
        unknown = str(error).rpartition(" ")[2]
        raise ValueError(f"way is {row.name}, and the model has no option {unknown}") from error


def load_clip(options: WaysOptions) -> Clip:
    """Load the CLIP that selects the best candidates."""
    return Clip.from_pretrained(options.clip, pick_device(options.device))


def shares(results: Sequence[Measured]) -> dict[str, np.ndarray]:
    """Return each prompt's shares of `SHARES`; nan where fills are not visible."""
    return {
        "correct": np.array([np.mean(r.correct) for r in results]),
        "pairs": np.array([np.mean(r.pairs) if r.pairs else math.nan for r in results]),
        "best": np.array([float(r.correct[r.best]) for r in results]),
    }


def margin(values: np.ndarray) -> float:
    """Return half of the 95 % interval of the mean of independent values; nan are ignored.

    Where n values are all equal, it is 3 / n: the rule of three for what was never seen.
    """
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return math.nan
    if known.min() == known.max():
        return 3 / len(known)
    return 1.96 * float(known.std(ddof=1)) / math.sqrt(len(known))


def format_ways_table(scores: Mapping[str, float]) -> str:
    """Return a row for each model and way: shares, their margins, and differences to the first."""
    names = [n.removesuffix("/diversity") for n in scores if n.endswith("/diversity")]
    width = max(map(len, names))
    titles = ("everything", "object and material", "best by CLIP")
    lines = [f"{'':{width}}" + "".join(f"  {title:>34}" for title in titles) + "  diversity"]
    for name in names:
        cells = ""
        for share in SHARES:
            key = f"{name}/{share}"
            cell = f"{scores[key]:.1%} ± {scores[key + '/margin']:.1%}"
            if name != names[0]:
                difference, within = scores[f"{key}/difference"], scores[f"{key}/difference/margin"]
                cell += f" ({difference:+.1%} ± {within:.1%})"
            cells += f"  {cell:>34}"
        lines.append(f"{name:{width}}{cells}  {scores[f'{name}/diversity']:9.3f}")
    count = int(scores["prompts"])
    lines.append(
        f"{count} prompts; ± is half of a 95 % interval over prompts; in brackets, the difference "
        "to the first row on the same prompts."
    )
    return "\n".join(lines)
