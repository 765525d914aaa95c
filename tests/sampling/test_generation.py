"""A model's own sampling defaults: kept in its folder, replaced by what is given."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dalle1.sampling.generation import GENERATION_NAME, GenerationConfig
from dalle2.options import UnclipOptions


def test_what_differs_from_the_papers_sampling_is_stored(tmp_path: Path) -> None:
    config = GenerationConfig(guidance=2.5, num_candidates=32, rerank="likelihood")
    config.save(tmp_path)
    stored = json.loads((tmp_path / GENERATION_NAME).read_text())
    assert stored == {"guidance": 2.5, "num_candidates": 32, "rerank": "likelihood"}
    assert GenerationConfig.load(tmp_path) == config
    GenerationConfig().save(tmp_path)
    assert not (tmp_path / GENERATION_NAME).exists()
    assert GenerationConfig.load(tmp_path) == GenerationConfig()


def test_explicit_values_replace_the_defaults(tmp_path: Path) -> None:
    config = GenerationConfig(guidance=2.5, top_p=0.9)
    changed = config.updated(guidance=1.0, top_p=None, rerank=None)
    assert changed == GenerationConfig(guidance=1.0, top_p=0.9)


def test_values_of_another_type_are_refused() -> None:
    for bad, message in (
        ({"temperature": "x"}, "temperature is 'x', expected a finite number"),
        ({"resample_every": "x"}, "resample_every is 'x', expected int"),
        ({"resample_every": 2.5}, "resample_every is 2.5, expected int"),
        ({"guidance": math.inf}, "guidance is inf, expected a finite number"),
        ({"num_candidates": True}, "num_candidates is True, expected int"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationConfig(**bad)  # type: ignore[arg-type]
    for bad, message in (
        ({"steps": "x"}, "steps is 'x', expected int"),
        ({"clip_guidance": "x"}, "clip_guidance is 'x', expected a finite number"),
        ({"sampler": "euler"}, "sampler is 'euler', expected ancestral or ddim"),
    ):
        with pytest.raises(ValueError, match=message):
            UnclipOptions(**bad)  # type: ignore[arg-type]
    numbers = GenerationConfig(guidance=np.float32(2), num_candidates=np.int64(3))  # type: ignore[arg-type]
    assert numbers == GenerationConfig(guidance=2, num_candidates=3)


def test_fields_of_later_versions_are_ignored(tmp_path: Path) -> None:
    (tmp_path / GENERATION_NAME).write_text('{"guidance": 3, "min_p": 0.1}')
    assert GenerationConfig.load(tmp_path) == GenerationConfig(guidance=3)


@pytest.mark.parametrize(
    "damage",
    ["", "[]", '{"guidance": "2"}', '{"rerank": "taste"}', '{"top_p": 0}', '{"guidance": null}',
     '{"num_candidates": 0}', '{"num_candidates": 2.5}'],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / GENERATION_NAME).write_text(damage)
    with pytest.raises(ValueError, match=r"generation.json is damaged .*; remove it"):
        GenerationConfig.load(tmp_path)
