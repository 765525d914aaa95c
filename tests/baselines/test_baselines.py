"""N-grams against a plain implementation, an LSTM that learns, and the table of all models."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import tiny_model, write_images

from dalle1.baselines.lstm import LSTM, train_lstm
from dalle1.baselines.ngram import (
    NGram,
    max_order,
    neighbour_contexts,
    preceding,
    raster_contexts,
    sample_grids,
)
from dalle1.commands.evaluate import main
from dalle1.evaluation.bits import Pairs, bits_scores
from dalle1.model.transformer import TransformerConfig

V = 5
RNG = np.random.default_rng(0)
GRIDS = RNG.choice(V, p=[0.5, 0.2, 0.15, 0.1, 0.05], size=(30, 4, 4))


def plain_kneser_ney(
    events: list[tuple[int, ...]], event: tuple[int, ...], top: bool = True
) -> float:
    """P of event[0] after event[1:], nearest first, straight from the definition."""
    if not event:
        return 1 / V
    counts = Counter(events)
    if not top:
        counts = Counter(event[:-1] for event in counts)
    length = len(event)
    ones, twos = (sum(c == n for c in counts.values()) for n in (1, 2))
    discount = ones / (ones + 2 * twos) if ones and twos else 0.5
    own = {e: c for e, c in counts.items() if e[1:] == event[1:]}
    lower = [event[:length] for event in counts]
    backoff = plain_kneser_ney([*dict.fromkeys(lower)], event[:-1], top=False)
    if not own:
        return backoff
    total = sum(own.values())
    p = max(own.get(event, 0) - discount, 0) / total if event in own else 0.0
    return p + discount * len(own) / total * backoff


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngrams_equal_the_definition(order: int) -> None:
    contexts = raster_contexts(order - 1, V)(GRIDS).reshape(GRIDS.size, order - 1)
    model = NGram(GRIDS.reshape(-1), contexts, V)
    events = [(int(t), *map(int, c)) for t, c in zip(GRIDS.reshape(-1), contexts)]
    others = [tuple(map(int, RNG.integers(V, size=order))) for _ in range(10)]
    for event in [*events[:10], *others]:
        found = model.probabilities(np.array([event[0]]), np.array([event[1:]], dtype=int))
        assert found[0] == pytest.approx(plain_kneser_ney(events, event)), event


@pytest.mark.parametrize("make", [raster_contexts, neighbour_contexts])
def test_probabilities_of_all_tokens_sum_to_1(make: type) -> None:
    contexts = make(3, V)
    model = NGram(GRIDS.reshape(-1), contexts(GRIDS).reshape(-1, 3), V)
    seen = contexts(GRIDS)[0].reshape(-1, 3)
    unseen = RNG.integers(V, size=(20, 3))
    assert model.distributions(np.concatenate([seen, unseen])).sum(1) == pytest.approx(1)


def test_contexts_are_the_codes_before_and_around() -> None:
    grids = np.arange(9).reshape(1, 3, 3)
    assert raster_contexts(2, 99)(grids)[0, 1, 0].tolist() == [2, 1]
    assert raster_contexts(2, 99)(grids)[0, 0, 0].tolist() == [99, 99]
    around = neighbour_contexts(4, 99)(grids)[0]
    assert around[1, 1].tolist() == [3, 1, 0, 2]
    assert around[1, 0].tolist() == [99, 0, 99, 1]
    assert around[2, 2].tolist() == [7, 5, 4, 99]
    assert preceding(np.array([[1, 2, 3]]), 2, 9).tolist() == [[[9, 9], [1, 9], [2, 1]]]


def test_two_dimensions_predict_vertical_stripes() -> None:
    stripes = np.repeat(RNG.integers(V, size=(200, 1, 6)), 6, axis=1)
    held = np.repeat(RNG.integers(V, size=(20, 1, 6)), 6, axis=1)
    bits = {}
    for make in (raster_contexts, neighbour_contexts):
        contexts = make(2, V)
        model = NGram(stripes.reshape(-1), contexts(stripes).reshape(-1, 2), V)
        p = model.probabilities(held.reshape(-1), contexts(held).reshape(-1, 2))
        bits[make] = -np.log2(p).mean()
    assert bits[neighbour_contexts] < 0.5 < 1.5 < bits[raster_contexts]
    sampled = sample_grids(model, contexts, 8, 6, seed=0)
    assert (sampled[:, 1:] == sampled[:, :-1]).mean() > 0.95


def test_too_long_ngrams_are_refused() -> None:
    assert [max_order(v) for v in (1, 512, 8192, 16_384)] == [62, 6, 4, 4]
    with pytest.raises(ValueError, match="order is 6, expected at most 4 for 8192 tokens"):
        NGram(np.zeros(3), np.zeros((3, 5)), 8192)


def config() -> TransformerConfig:
    small = {"text_vocab": 20, "text_len": 4, "width": 8, "depth": 1, "heads": 1}
    return TransformerConfig(codebook_size=V, grid_size=4, **small)


def test_an_lstm_learns_that_codes_follow_captions() -> None:
    torch.manual_seed(0)
    text = torch.arange(4).repeat(64, 1) + 20
    text[:, 0] = torch.randint(V, (64,))
    codes = text[:, :1, None].expand(-1, 4, 4).contiguous()
    lstm, pairs, losses = LSTM.with_parameters(config(), 3000), Pairs(text, codes), list[float]()
    assert sum(p.numel() for p in lstm.parameters()) <= 3000
    train_lstm(lstm, pairs, 60, 16, 2e-2, losses.append)
    assert losses[-1] < 0.4 < 1 < losses[0]
    empty = torch.arange(20, 24)[None]
    scores = dict(bits_scores(lstm, pairs, empty))
    assert scores["bits per code"] < 0.8
    assert scores["bits per image"] < scores["bits per image, no caption"]
    sampled = lstm.sample(text[:6], seed=0)
    assert (sampled == codes[:6]).float().mean() > 0.8


def test_an_lstm_sees_no_token_before_it_predicts_it() -> None:
    torch.manual_seed(0)
    lstm, text = LSTM(config(), 8), torch.randint(20, (2, 4))
    codes = torch.randint(V, (2, 4, 4))
    changed = codes.clone()
    changed[:, 2, 1] = (codes[:, 2, 1] + 1) % V
    before, after = lstm.losses(text, codes)[1], lstm.losses(text, changed)[1]
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any()


def test_more_parameters_than_nothing_are_needed() -> None:
    with pytest.raises(ValueError, match="parameters is 20, expected more"):
        LSTM.with_parameters(config(), 20)


def test_the_command_compares_all_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    write_images(tmp_path / "data", 24)
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    more = ["--lstm-steps", "2", "--samples", "2", "--order", "2", "--batch-size", "2"]
    main(["baselines", *words, *more, "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    names = ["1-gram", "2-gram", "2-D, 1 neighbour", "2-D, 4 neighbours", "LSTM", "transformer"]
    assert all(f"\n{name} " in table for name in names)
    scores = json.loads((tmp_path / "out" / "baselines.json").read_text())["scores"]
    assert 0 < scores["2-gram/bits per code"] < 6
    assert 0 < scores["2-gram/bits per text token"] < 12
    assert (tmp_path / "out" / "samples.png").is_file()


def test_too_long_ngrams_are_refused_before_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["baselines", "--model", str(tmp_path), "--data", "nowhere", "--order", "9"])
    assert "--order is 9, expected at most 7 for this vocabulary" in capsys.readouterr().err


def test_wrong_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, error in (
        (["--order", "0"], "--order is 0, expected at least 1"),
        (["--lstm-steps", "-1"], "--lstm-steps is -1, expected 0 or more"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["baselines", *words])
        assert stop.value.code == 2
        assert error in capsys.readouterr().err
