"""Vocabularies of the imported models: the ids that the originals give."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers.implementations import CharBPETokenizer

from benchmarks.peers import dalle_pytorch
from dalle1.importers.clip_bpe import read_clip_bpe
from dalle1.importers.dalle_pytorch import load_tokenizer as load_clip
from dalle1.importers.mindalle import load_tokenizer as load_mindalle
from dalle1.importers.rudalle import load_tokenizer as load_rudalle
from dalle1.importers.yttm import read_yttm
from dalle1.text.bpe import Tokenizer
from dalle1.text.format import TextFormat

FIXTURE: dict[str, Any] = json.loads(
    Path(__file__).with_name("youtokentome.json").read_text(encoding="utf-8")
)
"""A vocabulary that youtokentome 1.0.6 wrote, and captions with its ids."""
SIZE = 97


@pytest.fixture
def yttm_file(tmp_path: Path) -> Path:
    path = tmp_path / "bpe.model"
    path.write_text(FIXTURE["model"], encoding="utf-8")
    return path


def test_youtokentome(yttm_file: Path) -> None:
    bpe = read_yttm(yttm_file)
    assert [bpe.encode(text).ids for text, _ in FIXTURE["cases"]] == [
        ids for _, ids in FIXTURE["cases"]
    ]


def test_rudalle(yttm_file: Path) -> None:
    tokenizer = load_rudalle(yttm_file, SIZE)
    assert tokenizer.encode([" Рыжий КОТ ", ""], 7).tolist() == [
        [2, 59, 29, 3, 101, 102, 103],
        [2, 3, 99, 100, 101, 102, 103],
    ]
    assert tokenizer.encode(["рыжий кот"], 3).tolist() == [[2, 59, 29]]  # the end is cut first
    assert tokenizer.encode(["кот"], 4, ends=False).tolist() == [[2, 29, 99, 100]]
    assert tokenizer.count("рыжий кот") == 4
    assert tokenizer.decode(tokenizer.encode(["рыжий кот"], 7)) == ["рыжий кот"]


def test_rudolphs_special_tokens_follow_the_vocabulary(yttm_file: Path) -> None:
    tokenizer = load_rudalle(yttm_file, SIZE + 8)
    assert tokenizer.encode(["кот"], 6).tolist() == [[2, SIZE + 2, 29, 3, SIZE + 12, SIZE + 13]]
    assert tokenizer.vocab_size == SIZE + 8
    with pytest.raises(ValueError, match="has 97 tokens, the transformer 90"):
        load_rudalle(yttm_file, 90)


def test_save_and_load_keep_format_and_ids(yttm_file: Path, tmp_path: Path) -> None:
    tokenizer = load_rudalle(yttm_file, SIZE + 8)
    tokenizer.save(tmp_path / "vocab.json")
    loaded = Tokenizer.load(tmp_path / "vocab.json")
    assert loaded.format == tokenizer.format
    assert torch.equal(loaded.encode(["рыжий кот"], 8), tokenizer.encode(["рыжий кот"], 8))


@pytest.mark.parametrize("damage", ['"bos": [2, "3"]', '"other": 1'])
def test_a_damaged_format_is_refused(yttm_file: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "vocab.json"
    load_rudalle(yttm_file, SIZE).save(path)
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace('"bos": [2]', damage), encoding="utf-8")
    with pytest.raises(ValueError, match="is not a readable vocabulary"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    "content",
    ["", "<html>", "1 0\n97 1\n", "1 1\n97 4\n4 9 5\n1 0 2 3\n", "1 0\n97 9\n1 0 2 3\n"],
)
def test_other_files_are_no_vocabulary_of_youtokentome(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bpe.model"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="expected"):
        read_yttm(path)


def char_bpe(folder: Path) -> tuple[Path, Path]:
    """Train a small vocabulary as minDALL-E's was, and write its two files."""
    trained = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    texts = ["a red cat on a mat", "the red hat", "a cat and a rat"] * 9
    trained.train_from_iterator(texts, 60, 2, special_tokens=["[PAD]", "[UNK]"])
    vocabulary, merges = trained.save_model(str(folder), "bpe-16k")
    return Path(vocabulary), Path(merges)


def test_mindalle(tmp_path: Path) -> None:
    files = char_bpe(tmp_path)
    original = CharBPETokenizer.from_file(*map(str, files), unk_token="[UNK]", lowercase=True)
    tokenizer = load_mindalle(*files)
    for text in ("A red CAT", "a zebra, é 日本", "", "  mat\n"):
        ids = original.encode(text).ids[:12]
        pads = list(range(tokenizer.vocab_size + len(ids), tokenizer.vocab_size + 12))
        assert tokenizer.encode([text], 12)[0].tolist() == ids + pads
    assert tokenizer.decode(tokenizer.encode(["A red cat"], 12)) == ["a red cat"]
    with pytest.raises(ValueError, match=r"no vocabulary .* expected those of minDALL-E"):
        load_mindalle(files[1], files[0])


def test_the_bpe_of_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("dalle_pytorch")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package dalle_pytorch; `make test` installs it")
    path = Path(spec.submodule_search_locations[0]) / "data" / "bpe_simple_vocab_16e6.txt"
    tokenizer = load_clip(path, 49_408)
    dalle_pytorch()
    monkeypatch.setitem(sys.modules, "youtokentome", ModuleType("youtokentome"))
    original = importlib.import_module("dalle_pytorch.tokenizer").tokenizer
    for text in (
        "A photo of a CAT, it's 3 o'clock!",
        "&amp;amp; café \u00a0 日本 \U0001f600",
        "",
        "it'ſ  wow!!! 12345",
        "\x00 tab\t ﬁ",
    ):
        ids = [i or 49_408 + p + 1 for p, i in enumerate(original.encode(text)[:15])]
        pads = list(range(49_408 + len(ids) + 1, 49_408 + 16))
        assert tokenizer.encode([text], 16)[0].tolist() == [0, *ids, *pads]
    assert tokenizer.decode(tokenizer.encode(["A café cat"], 16)) == ["a café cat"]
    with pytest.raises(ValueError, match="holds no merges of CLIP"):
        read_clip_bpe(Path(__file__))


class NoDropout(random.Random):
    """Random numbers that skip no merge."""

    def random(self) -> float:
        return 1.0


@pytest.mark.parametrize("kind", ["youtokentome", "mindalle"])
def test_dropout_that_skips_nothing_changes_nothing(
    yttm_file: Path, tmp_path: Path, kind: str
) -> None:
    tokenizer = load_rudalle(yttm_file, SIZE)
    captions = [text for text, _ in FIXTURE["cases"]]
    if kind == "mindalle":
        tokenizer = load_mindalle(*char_bpe(tmp_path))
        captions = ["A red CAT", "a zebra, é 日本", ""]
    dropped = tokenizer.encode(captions, 40, dropout=0.5, rng=NoDropout())
    assert torch.equal(dropped, tokenizer.encode(captions, 40))


def test_a_pad_id_becomes_the_padding_of_its_position(yttm_file: Path) -> None:
    bpe = read_yttm(yttm_file)
    tokenizer = Tokenizer(bpe, format=TextFormat(bos=(29,), pad_id=29, fills_all=True))
    assert tokenizer.encode(["кот кот рыжий"], 4).tolist() == [[29, SIZE + 1, SIZE + 2, 59]]
