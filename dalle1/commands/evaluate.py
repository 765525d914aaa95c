"""Evaluate a model's samples, its bits per token, a CLIP or a dVAE.

    dalle1 evaluate toybox --best-of 1 16 64 --num-prompts 200 50 12 --out runs/evaluation
    dalle1 evaluate samples --images outputs/a-red-star --reference toybox:1000
    dalle1 evaluate clip --clip runs/clip --data toybox
    dalle1 evaluate dvae --model runs/dvae --data toybox --images 1000
    dalle1 evaluate bits --model bundled --data toybox
    dalle1 evaluate unclip --model runs/unclip/model --beside bundled
    dalle1 evaluate ways --models bundled --ways default guidance=2 guidance=2,resample=clip
    dalle1 evaluate votes --a outputs/ours --b outputs/theirs
    dalle1 evaluate baselines --model bundled --data runs/codes --lstm-steps 1000

`toybox` measures how often samples show what their prompts ask for. `samples` compares any images
with their prompts and with real images. `clip` measures a CLIP, `dvae` an image tokenizer, `bits`
how many bits a model needs per text token and per code, `baselines` how many n-grams and an LSTM
need. `unclip` exchanges and removes parts of a DALL·E 2. `ways` compares models, and ways of
sampling from them, on the same prompts.
`votes` writes a page on which people compare two models, and counts their votes. Each prints
a table and writes its scores to a JSON file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from dalle1.baselines.comparison import (
    BaselinesOptions,
    evaluate_baselines,
    format_baselines_table,
)
from dalle1.console import command_line, notes, one_line_errors, parse
from dalle1.evaluation.bits import BitsOptions, evaluate_bits
from dalle1.evaluation.clip import ClipOptions, evaluate_clip
from dalle1.evaluation.reconstruction import RECONSTRUCTIONS, DVAEOptions, evaluate_dvae
from dalle1.evaluation.report import Scores, format_table, write_report
from dalle1.evaluation.samples import SamplesOptions, evaluate_samples
from dalle1.evaluation.toybox import (
    HELD_OUT,
    PROMPTS,
    ToyboxOptions,
    evaluate_toybox,
    format_toybox_table,
)
from dalle1.evaluation.unclip import UnclipOptions, evaluate_unclip, format_unclip_table
from dalle1.evaluation.votes import KEY, PAGE, VotesOptions, evaluate_votes
from dalle1.evaluation.ways import WaysOptions, evaluate_ways, format_ways_table
from dalle1.json_files import parse_json
from dalle1.outputs import check_writable


@dataclass(frozen=True)
class Evaluator:
    """A subcommand: its options, what yields its scores, and how they are printed."""

    options: type
    evaluate: Callable[[Any], Scores]
    format_table: Callable[[Mapping[str, float]], str] = format_table
    writes: tuple[str, ...] = ()
    """Files that it writes beside its report, NAME.json."""


EVALUATORS = {
    "toybox": Evaluator(ToyboxOptions, evaluate_toybox, format_toybox_table, (PROMPTS, HELD_OUT)),
    "samples": Evaluator(SamplesOptions, evaluate_samples),
    "clip": Evaluator(ClipOptions, evaluate_clip),
    "dvae": Evaluator(DVAEOptions, evaluate_dvae, writes=(RECONSTRUCTIONS,)),
    "bits": Evaluator(BitsOptions, evaluate_bits),
    "unclip": Evaluator(UnclipOptions, evaluate_unclip, format_unclip_table),
    "ways": Evaluator(WaysOptions, evaluate_ways, format_ways_table),
    "votes": Evaluator(VotesOptions, evaluate_votes, writes=(PAGE, KEY)),
    "baselines": Evaluator(BaselinesOptions, evaluate_baselines, format_baselines_table),
}


def run(options: Any) -> dict[str, float]:
    """Run the evaluator of these options, print and write its scores, and return them."""
    name, evaluator = next((n, e) for n, e in EVALUATORS.items() if e.options is type(options))
    path = options.out / f"{name}.json"
    check_writable(options.out)
    check_own(path, evaluator.writes)
    scores = dict(evaluator.evaluate(options))
    write_report(path, options, scores)
    print(evaluator.format_table(scores))
    print(f"wrote {path}")
    return scores


def check_own(report: Path, others: Sequence[str]) -> None:
    """Raise ValueError where files to be written exist, and are not of an earlier evaluation."""
    with suppress(OSError, ValueError):
        if {"settings", "scores"} <= set(parse_json(report, dict)):
            return
    for path in (report, *(report.parent / name for name in others)):
        if path.exists():
            raise ValueError(
                f"{path} is not of an earlier evaluation, and is kept; use another --out"
            )


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line and run one evaluator."""
    subcommands = tuple(
        Annotated[evaluator.options, tyro.conf.subcommand(name)]
        for name, evaluator in EVALUATORS.items()
    )
    with one_line_errors(), notes():
        words = command_line(args)
        if not words or words[0] not in (*EVALUATORS, "-h", "--help"):
            first, names = repr(words[0]) if words else "missing", ", ".join(EVALUATORS)
            raise ValueError(f"the first argument is {first}, expected one of: {names}")
        run(parse(Union[subcommands], words, __doc__))  # noqa: UP007
