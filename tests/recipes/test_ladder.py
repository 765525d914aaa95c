"""The recipes of scaling laws: the order of their commands, limits, and where they stop."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dalle1.commands.fit_scaling import ScalingOptions
from dalle1.console import parse
from dalle1.evaluation.clip import ClipOptions
from dalle1.tasks.clip import CLIP_PRESETS, ClipTrainConfig
from dalle1.tasks.transformer import TRANSFORMER_PRESETS, TransformerTrainConfig

ROOT = Path(__file__).resolve().parents[2]
RECORD = """#!/bin/sh
case $1 in -c) echo 1000.0 640.0; exit;; esac
shift 2
echo "$@" >> "$RECORD"
case "$*" in *"$STOP"*) echo "Stopped at step 3, saved in x; the same command resumes";; esac
"""


def commands(
    folder: Path, stop: str = "nowhere", recipe: str = "ladder.sh", **changes: str
) -> tuple[int, list[list[str]]]:
    """Run the recipe with a Python that only records its arguments."""
    record, python = folder / "record", folder / "python"
    record.unlink(missing_ok=True)
    python.write_text(RECORD)
    python.chmod(0o755)
    sizes = {"SIZES": "32:2:2 64:3:4", "STEPS": "10 20", "OUT": str(folder / "out")}
    environment = {**os.environ, **sizes, "PYTHON": str(python), "RECORD": str(record)}
    done = subprocess.run(
        [str(ROOT / "recipes" / recipe)],
        env={**environment, "STOP": stop, "FLAGS": "--num-workers 0", **changes},
        capture_output=True,
    )
    return done.returncode, [line.split() for line in record.read_text().splitlines()]


def test_the_largest_run_is_predicted_before_it_is_trained(tmp_path: Path) -> None:
    code, found = commands(tmp_path)
    assert code == 0
    names = [words[-3].rpartition("/")[2] for words in found if words[0] == "train"]
    assert names == [f"width-{w}-steps-{s}" for w in (32, 64) for s in (10, 20)]
    assert [words[0] for words in found] == [
        "encode", "train", "train", "train", "fit-scaling", "train", "fit-scaling",
    ]  # fmt: skip
    config = parse(
        TransformerTrainConfig, found[-2][3:], "", default=TRANSFORMER_PRESETS["toy-128"]
    )
    assert (config.model.width, config.model.depth, config.model.heads) == (64, 3, 4)
    assert (config.steps, config.warmup_steps, config.batch_size) == (20, 2, 16)
    before, after = (parse(ScalingOptions, found[i][1:], "") for i in (4, 6))
    assert before.predict == (12 * 64 * 64 * 3, 20 * 16 * 256)
    assert (before.hold_out, len(before.runs)) == (0, 3)
    assert (after.hold_out, len(after.runs)) == (1, 4)
    assert before.out.name == "prediction-width-64-steps-20"
    before.out.with_name("width-64-steps-20").mkdir(parents=True)
    _, found = commands(tmp_path)  # the prediction stays once the run began
    assert [words[0] for words in found][-2:] == ["train", "fit-scaling"]
    assert [words[0] for words in found].count("fit-scaling") == 1


@pytest.mark.parametrize("encoded", [True, False])
def test_it_stops_where_a_training_was_stopped(tmp_path: Path, encoded: bool) -> None:
    if encoded:
        (tmp_path / "out" / "codes").mkdir(parents=True)
        (tmp_path / "out" / "codes" / "entries.npy").touch()
    code, found = commands(tmp_path, stop="width-64-steps-10")
    assert code == 130
    assert [words[0] for words in found] == ["encode"] * (not encoded) + ["train"] * 3


def test_runs_above_the_limit_are_skipped(tmp_path: Path) -> None:
    code, found = commands(tmp_path, LIMIT=str(12 * 32 * 32 * 2 * 20))
    assert code == 0
    names = [words[-3].rpartition("/")[2] for words in found if words[0] == "train"]
    assert names == ["width-32-steps-10", "width-32-steps-20"]


def test_clips_are_trained_evaluated_and_fitted(tmp_path: Path) -> None:
    code, found = commands(tmp_path, recipe="clip-ladder.sh", WIDTHS="4 8")
    assert code == 0
    before = ["train", "evaluate"] * 3 + ["fit-scaling"]
    assert [words[0] for words in found] == [*before, "train", "evaluate", "fit-scaling"]
    prediction = parse(ScalingOptions, found[6][1:], "")
    assert (prediction.predict, prediction.hold_out, len(prediction.runs)) == ((1000, 640), 0, 3)
    config = parse(ClipTrainConfig, found[-3][3:], "", default=CLIP_PRESETS["small"])
    assert (config.model.width, config.model.text_width, config.steps) == (8, 64, 20)
    assert parse(ClipOptions, found[-2][2:], "").out == config.out
    assert parse(ScalingOptions, found[-1][1:], "").runs[-1] == config.out
    code, found = commands(tmp_path, "width-8-steps-10", "clip-ladder.sh", WIDTHS="4 8")
    assert (code, len(found)) == (130, 3)
