"""A model's own sampling defaults: kept in its folder, replaced by what is given."""

import json
from pathlib import Path

import pytest

from dalle1.sampling.generation import GENERATION_NAME, GenerationConfig


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
