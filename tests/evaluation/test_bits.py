"""Bits per token: against the pipeline's own, by hand, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_model import CAPTIONS, tiny_model, write_images

from dalle1.commands.evaluate import main
from dalle1.data import encoded
from dalle1.evaluation.bits import Pairs, bits_scores, is_counted, read_pairs, token_bits
from dalle1.image_tokenizer import load_image_tokenizer
from dalle1.pipeline import BUNDLED, DallE
from dalle1.sampling.decoding import null_caption
from dalle1.text.format import TextFormat


@pytest.fixture(scope="module")
def model() -> DallE:
    return tiny_model()


def pairs_of(model: DallE, count: int) -> Pairs:
    codes = torch.randint(16, (count, 4, 4), generator=torch.Generator().manual_seed(1))
    return Pairs(model.tokenizer.encode(CAPTIONS[:count], 8), codes)


def test_scores_are_those_of_the_pipeline_whatever_the_batch(model: DallE) -> None:
    held = pairs_of(model, 5)
    empty = model.empty_caption()
    scores = dict(bits_scores(model.transformer, held, empty, 2))
    assert scores == pytest.approx(dict(bits_scores(model.transformer, held, empty, 5)), rel=1e-5)
    single = [model.bits(c, held.codes[i : i + 1]) for i, c in enumerate(CAPTIONS[:5])]
    code_bits = [float(bits) for _, bits in single]
    lengths = is_counted(model.transformer.config, held.text).sum(1).tolist()
    text_bits = [bits * n for (bits, _), n in zip(single, lengths)]
    assert scores["bits per code"] == pytest.approx(sum(code_bits) / 5, rel=1e-5)
    assert scores["bits per image"] == pytest.approx(16 * sum(code_bits) / 5, rel=1e-5)
    assert scores["bits per caption"] == pytest.approx(sum(text_bits) / 5, rel=1e-5)
    assert scores["bits per text token"] == pytest.approx(sum(text_bits) / sum(lengths), rel=1e-5)
    without = [16 * float(model.bits("", held.codes[i : i + 1])[1]) for i in range(5)]
    assert scores["bits per image, no caption"] == pytest.approx(sum(without) / 5, rel=1e-5)


@pytest.mark.parametrize("pad_targets", [True, False])
def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabularies(
    pad_targets: bool,
) -> None:
    model = tiny_model(scale=0.0, pad_targets=pad_targets)
    scores = dict(bits_scores(model.transformer, pairs_of(model, 3), model.empty_caption()))
    assert scores["bits per code"] == pytest.approx(4)  # of 16 codes
    assert scores["bits per code ±"] == pytest.approx(0, abs=1e-6)
    assert scores["bits per text token"] == pytest.approx(math.log2(278))
    tokens = [model.tokenizer.count(c) + pad_targets for c in CAPTIONS[:3]]
    assert scores["tokens per caption"] == pytest.approx(sum(tokens) / 3)


def test_the_command_measures_a_folder_of_images(model: DallE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    write_images(tmp_path / "data")
    data, folder, out = (str(tmp_path / name) for name in ("data", "model", "out"))
    main(["bits", "--model", folder, "--data", data, "--device", "cpu", "--out", out])
    report = json.loads((tmp_path / "out" / "bits.json").read_text())
    assert report["settings"]["data"] == data
    assert 0 < report["scores"]["bits per code"] < 32


def test_codes_are_recognised_by_the_image_tokenizer_that_encoded_them(
    model: DallE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model folder may hold the same image tokenizer in other bytes."""
    write_images(tmp_path / "data", 3)
    model.image_tokenizer.save(tmp_path / "dvae", torch.float16)
    dvae, codes = str(tmp_path / "dvae"), str(tmp_path / "codes")
    data = ["--data", str(tmp_path / "data"), "--num-workers", "0", "--device", "cpu"]
    encoded.main(["--dvae", dvae, *data, "--out", codes])
    loaded = DallE(load_image_tokenizer(dvae), model.transformer, model.tokenizer)
    loaded.save_pretrained(tmp_path / "model")
    words = ["bits", "--model", str(tmp_path / "model"), "--data", codes, "--device", "cpu"]
    words += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(words)
    assert "are of another dVAE than" in capsys.readouterr().err
    main([*words, "--dvae", dvae])
    assert "bits per code" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "--dvae", str(BUNDLED)])
    assert "another image tokenizer than that in" in capsys.readouterr().err


def test_nan_weights_are_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.transformer.image_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="logits are nan, expected numbers"):
        dict(bits_scores(model.transformer, pairs_of(model, 2), model.empty_caption()))


def test_no_caption_has_the_tokens_around_a_caption(tmp_path: Path) -> None:
    """As the pipeline samples without a caption; other models' vocabularies set such tokens."""
    model = tiny_model()
    model.tokenizer.format = TextFormat(bos=(1,), eos=(2,))
    model.save_pretrained(tmp_path / "model")
    write_images(tmp_path / "data")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    main(["bits", *words, "--device", "cpu", "--out", str(tmp_path / "out")])
    scores = json.loads((tmp_path / "out" / "bits.json").read_text())["scores"]
    model = DallE.from_pretrained(tmp_path / "model", clip="none", device="cpu")
    held = read_pairs(model, tmp_path / "model", str(tmp_path / "data"), 256)
    without = 16 * float(model.bits("", held.codes)[1].mean())
    assert scores["bits per image, no caption"] == pytest.approx(without, rel=1e-5)
    bare = Pairs(null_caption(model.transformer).repeat(len(held.text), 1), held.codes)
    _, bits = token_bits(model.transformer, bare)
    assert without != pytest.approx(float(bits.sum(1).mean()), rel=1e-3)


def test_images_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bits", "--images", "0"])
    assert stop.value.code == 2
    assert "--images is 0, expected at least 1" in capsys.readouterr().err
