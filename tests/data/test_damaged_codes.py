"""Folders of codes with damage in the index, in the shards or in single pairs."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tars import write_tar

from dalle1.data.codes import COUNT_KEY, ENTRIES_NAME, FILES, INDEX_NAME, CodeSource, sizes_of
from dalle1.data.sources.indexed_shards import index_files


def array(codes: Any, kind: Any = np.uint16) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(codes, kind), allow_pickle=True)
    return file.getvalue()


GOOD = array([[[0, 1], [2, 3]]])
CAPTIONS = b'{"captions": ["a red cube"]}'


def write_codes(folder: Path, codes: bytes = GOOD, captions: bytes = CAPTIONS) -> Path:
    members = [("0.npy", GOOD), ("0.json", CAPTIONS), ("1.npy", codes), ("1.json", captions)]
    shards = [write_tar(folder / "00000.tar", members)]
    np.save(folder / ENTRIES_NAME, index_files(shards, FILES))
    index = {"dvae": "0", COUNT_KEY: 2, "grid_size": 2, "shards": 1, "codebook_size": 4}
    (folder / INDEX_NAME).write_text(json.dumps({**index, "bytes": sizes_of(shards)}))
    return folder


@pytest.mark.parametrize(
    "damaged",
    [
        np.zeros((2, 4), np.int64),
        np.zeros(5, np.int64),
        np.zeros((2, 5), np.float32),
        np.array([None]),
    ],
)
def test_a_damaged_index_is_built_again(tmp_path: Path, damaged: np.ndarray) -> None:
    expected = CodeSource(write_codes(tmp_path), "encode").entries.copy()
    np.save(tmp_path / ENTRIES_NAME, damaged, allow_pickle=True)
    assert np.array_equal(CodeSource(tmp_path, "encode").entries, expected)
    (tmp_path / ENTRIES_NAME).write_bytes(b"\x93NUMPY")
    assert np.array_equal(CodeSource(tmp_path, "encode").entries, expected)


@pytest.mark.parametrize(
    "entry",
    [
        [5, 0, 9, 0, 9],
        [-1, 0, 9, 0, 9],
        [0, 0, 10**9, 0, 9],
        [0, -1, 9, 0, 9],
        [0, 0, 9, 1, -1],
        [0, 2**63 - 1, 2**63 - 1, 0, 9],  # their sum overflows
    ],
)
def test_an_index_that_leads_out_of_the_shards_is_named(tmp_path: Path, entry: list[int]) -> None:
    np.save(write_codes(tmp_path) / ENTRIES_NAME, np.array([entry] * 2))
    source = CodeSource(tmp_path, "encode")
    for read in (source.captions, source.crops):
        with pytest.raises(
            ValueError, match=r"entries\.npy is damaged: its pair 1 .* move it away"
        ):
            read(1)


@pytest.mark.parametrize(
    "damage",
    [
        '"grid_size": 1e999',
        '"grid_size": 0',
        '"shards": 0, "shard_size": 0',
        f'"shards": 0, "shard_size": 2, "{COUNT_KEY}": "2"',
    ],
)
def test_sizes_that_are_no_numbers_are_refused(tmp_path: Path, damage: str) -> None:
    index = write_codes(tmp_path) / INDEX_NAME
    index.write_text(f"{index.read_text()[:-1]}, {damage}}}")  # the last value of a key counts
    with pytest.raises(ValueError, match=r"holds no codes: expected codes\.json"):
        CodeSource(tmp_path)


@pytest.mark.parametrize(
    ("codes", "captions", "why"),
    [
        (array([[[0, 1], [2, 4]]]), CAPTIONS, "codes of 0 to 4"),
        (array([[[0, -1], [2, 3]]], np.int16), CAPTIONS, "codes of -1 to 3"),
        (array([[[0, 1, 2], [2, 3, 1]]]), CAPTIONS, r"codes of shape \(2, 3\)"),
        (array([[[]]]), CAPTIONS, "."),
        (array([[["a", "b"], ["c", "d"]]], object), CAPTIONS, "|"),
        (b"", CAPTIONS, "."),
        (GOOD[:-3], CAPTIONS, "."),
        (GOOD, b"", "."),
        (GOOD, b'{"captions": []}', "it has no captions"),
        (GOOD, b'{"captions": [3]}', "it has no captions"),
        (GOOD, b"[]", "expected an object"),
    ],
)
def test_a_damaged_pair_is_named(tmp_path: Path, codes: bytes, captions: bytes, why: str) -> None:
    source, rng = CodeSource(write_codes(tmp_path, codes, captions), "encode"), random.Random(0)
    assert source.caption(0, rng) == "a red cube"
    assert source.codes(0, rng).tolist() == [[0, 1], [2, 3]]
    read = source.caption if captions != CAPTIONS else source.codes
    with pytest.raises(ValueError, match=rf"00000\.tar is damaged: its pair 1 .*\(.*{why}"):
        read(1, rng)
