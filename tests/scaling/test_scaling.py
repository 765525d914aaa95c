"""Scaling laws: known exponents are found again, predictions, intervals, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_model import tiny_model

from dalle1.clip import Clip, ClipArch, new_clip
from dalle1.commands import fit_scaling
from dalle1.commands.fit_scaling import ScalingOptions, analyse, summary
from dalle1.scaling.fit import (
    bootstrap,
    compute_optimal,
    fit,
    flops_per_pair,
    frontier,
    interval,
)
from dalle1.scaling.runs import Run, read_run
from dalle1.storage import write_manifest
from dalle1.text.bpe import Tokenizer


def law_of_size_and_data(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return 0.5 + 400 / n**0.4 + 900 / d**0.3


def runs(noise: float = 0.0) -> list[Run]:
    rng = np.random.default_rng(0)
    return [
        Run(
            f"{n:g}-{d:g}",
            n,
            d,
            7 * n * d,
            float(law_of_size_and_data(np.array(n), np.array(d)) * (1 + noise * rng.normal())),
        )
        for n in (1e5, 3e5, 1e6, 3e6, 1e7)
        for d in (1e6, 4e6, 16e6, 64e6)
    ]


@pytest.mark.parametrize(("floor", "exponent"), [(0.0, 0.1), (0.6, 0.3), (2.0, 1.1)])
def test_a_law_of_compute_is_found_again(floor: float, exponent: float) -> None:
    compute = np.geomspace(1e12, 1e16, 12)[:, None]
    law = fit(compute, floor + (compute[:, 0] / 1e13) ** -exponent)
    assert law.floor == pytest.approx(floor, abs=2e-3)
    assert law.exponents == pytest.approx([exponent], rel=5e-3)
    ahead = np.array([[1e18]])
    assert law(ahead) == pytest.approx(floor + (1e18 / 1e13) ** -exponent, rel=5e-3)


def test_a_law_of_size_and_data_is_found_again() -> None:
    x = np.array([[run.parameters, run.tokens] for run in runs()])
    law = fit(x, law_of_size_and_data(*x.T))
    assert law.exponents == pytest.approx([0.4, 0.3], rel=2e-2)
    assert law.floor == pytest.approx(0.5, abs=2e-2)


def flops(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return training FLOPs as of transformers: what grows with the width costs small ones more."""
    return (6.5 + 1000 / n**0.5) * n * d


def test_the_optimal_size_spends_the_budget() -> None:
    """Against a search over the law and the FLOPs that the runs come from."""
    n, d = np.array([[run.parameters, run.tokens] for run in runs()]).T
    per_pair = flops_per_pair(n, d, flops(n, d))
    law = fit(np.stack([n, d], 1), law_of_size_and_data(n, d))
    for budget in (1e11, 1e15):
        parameters, tokens = compute_optimal(law, budget, per_pair)
        assert flops(np.array(parameters), np.array(tokens)) == pytest.approx(budget, rel=0.01)
        sizes = np.geomspace(parameters / 10, parameters * 10, 2001)
        lengths = budget / flops(sizes, np.ones(1))
        best = law_of_size_and_data(sizes, lengths).argmin()
        assert parameters == pytest.approx(sizes[best], rel=0.1)
    two = np.array([0, 4])  # runs of two sizes: a mean
    few = flops_per_pair(n[two], d[two], flops(n, d)[two])
    assert few(n[:, None]) == pytest.approx(np.sqrt(np.prod((flops(n, d) / (n * d))[two])))


def test_a_law_reports_the_numbers_of_its_formula() -> None:
    n, d = np.array([[run.parameters, run.tokens] for run in runs()]).T
    found = fit(np.stack([n, d], 1), law_of_size_and_data(n, d)).numbers()
    powers = n ** -found["exponent 0"], d ** -found["exponent 1"]
    loss = found["floor"] + found["coefficient 0"] * powers[0] + found["coefficient 1"] * powers[1]
    assert loss == pytest.approx(law_of_size_and_data(n, d), rel=1e-3)
    compute = np.geomspace(1e12, 1e16, 12)
    found = fit(compute[:, None], 0.6 + (compute / 1e13) ** -0.3).numbers()
    assert found["C0"] == pytest.approx(1e13, rel=0.02)


def test_intervals_cover_the_exponent_and_shrink_with_the_noise() -> None:
    compute = np.geomspace(1e12, 1e16, 20)[:, None]
    widths = []
    for noise in (0.02, 0.002):
        rng = np.random.default_rng(1)
        loss = (0.6 + (compute[:, 0] / 1e13) ** -0.3) * (1 + noise * rng.normal(size=20))
        low, high = interval(np.array([x.exponents[0] for x in bootstrap(compute, loss, 60)]))
        assert low < 0.3 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_the_frontier_is_the_lowest_loss_for_its_compute() -> None:
    compute, loss = np.array([1.0, 2.0, 3.0, 4.0, 4.0]), np.array([5.0, 6.0, 4.0, 3.0, 3.5])
    assert frontier(compute, loss).tolist() == [True, False, True, True, False]


def test_the_largest_run_is_predicted_and_not_fitted() -> None:
    options = ScalingOptions(runs=(), bootstrap=8, budget=1e15, predict=(1e7, 6.4e7))
    report, _ = analyse(runs(noise=0.003), options)
    (held,) = report["held out"]
    assert held["name"] == "1e+07-6.4e+07"
    predicted, low, high = held["by L(N, D)"]
    assert low <= predicted <= high
    assert predicted == pytest.approx(held["loss"], rel=0.03)
    spoilt = [*runs(noise=0.003)[:-1], runs()[-1]._replace(loss=99.0)]
    assert analyse(spoilt, options)[0]["L(N, D)"] == report["L(N, D)"]
    text = summary(report)
    assert report["predicted"]["by L(C)"] == pytest.approx(held["by L(C)"])
    for law in ("L(C)", "L(N, D)"):
        assert re.search(rf"10,000,000 parameters, .* predicted by {re.escape(law)}\n", text)
    assert re.search(r"L\(C\) = L∞ \+ \(C/C₀\)\^−α: L∞ \S+ \(.*\), α .*, C₀ \S+e\+\d+ \(", text)
    assert re.search(r"L\(N, D\) = .*, A \S+ \(.* to .*\), B \S+ \(.* to ", text)
    assert "optimal for 1e+15 FLOPs: " in text
    assert report["optimal"]["parameters"] * report["optimal"]["codes"] == pytest.approx(1e15 / 7)


def test_three_runs_on_the_frontier_have_no_interval() -> None:
    points = [(2.0, 10.0), (1.5, 20.0), (1.2, 30.0), (1.9, 40.0), (1.8, 50.0), (1.7, 60.0)]
    found = [
        Run(str(i), 1.0 + i, 1.0 + i**2, flops, loss) for i, (loss, flops) in enumerate(points)
    ]
    options = ScalingOptions(runs=(), hold_out=0, bootstrap=8)
    report, compute = analyse(found, options)
    assert not compute.resamples
    assert len(report["L(C)"]["floor"]) == 1
    assert "too few runs for an interval" in summary(report)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs to fit are 2 different ones, expected 3 or more"):
        fit(np.array([[1.0], [2.0], [2.0]]), np.array([3.0, 2.0, 2.0]))


def training(folder: Path, losses: list[float]) -> Path:
    """Write what a training of 10 updates of 4 pairs leaves."""
    checkpoint = folder / "step-10"
    checkpoint.mkdir(parents=True)
    tiny_model().transformer.save(checkpoint)
    torch.save({"step": 10, "resume_key": {"batch_size": "4"}}, checkpoint / "state.pt")
    save_file({"x": torch.zeros(1)}, checkpoint / "training.safetensors")
    lines = [{"step": 5 * i, "validation/image": loss} for i, loss in enumerate(losses, 1)]
    text = "\n".join(map(json.dumps, [*lines, {"step": 10, "total": 9.9}]))
    (folder / "log.jsonl").write_text(text + "\n{cut", encoding="utf-8")
    write_manifest(checkpoint, 10)
    return folder


def test_a_training_is_read(tmp_path: Path) -> None:
    run = read_run(training(tmp_path / "a", [3.0, 2.5]))
    model = tiny_model().transformer
    assert run.name == "a"
    assert run.loss == 2.5
    assert run.parameters == sum(p.numel() for p in model.layers.parameters())
    assert run.tokens == 10 * 4 * 16
    assert run.flops == 3 * 40 * model.flops()


@pytest.mark.parametrize("loss", [float("nan"), 0.0, float("inf")])
def test_a_loss_that_no_law_has_is_named(tmp_path: Path, loss: float) -> None:
    with pytest.raises(ValueError, match=r"the loss of .*a is .*, expected a number above 0"):
        read_run(training(tmp_path / "a", [3.0, loss]))


def test_damaged_lines_of_a_log_have_no_value(tmp_path: Path) -> None:
    folder = training(tmp_path / "a", [3.0])
    damaged = '3\n{"step": 5, "validation/image": null}\n{"validation/image": 1}\n'
    (folder / "log.jsonl").write_text(damaged + (folder / "log.jsonl").read_text())
    assert read_run(folder).loss == 3.0


def clip_training(folder: Path, report: object, **size: int) -> Path:
    """Write what a CLIP's training of 10 updates of 4 pairs, and its evaluation, leave."""
    checkpoint = folder / "step-10"
    arch = ClipArch(image_size=32, text_width=32, text_len=16, embed_dim=16, **size)
    new_clip(Tokenizer.train(["a red cube"], 300), arch).save_pretrained(checkpoint)
    torch.save({"step": 10, "resume_key": {"batch_size": "4"}}, checkpoint / "state.pt")
    save_file({"x": torch.zeros(1)}, checkpoint / "training.safetensors")
    write_manifest(checkpoint, 10)
    (folder / "clip.json").write_text(json.dumps(report))
    return folder


def test_a_clip_is_a_point_of_its_error_and_the_flops_of_both_towers(tmp_path: Path) -> None:
    report = {"scores": {"training/zero-shot/noun": 0.25, "training/zero-shot/fill": 0.5}}
    folder = clip_training(tmp_path / "a", report, patch_size=16, layers=2, width=64)
    run = read_run(folder)
    assert (run.loss, run.tokens, run.measure) == (0.75, 40, "error of training/zero-shot/noun")
    assert read_run(folder, "training/zero-shot/fill").loss == 0.5

    def tower(width: int, length: int) -> int:  # 2 layers: 4 + 8 squares of the width, attention
        return 2 * length * (2 * 12 * width**2 + 4 * length * width)

    patches, heads = 2 * 4 * (3 * 16**2) * 64, 2 * (64 + 32) * 16
    assert run.flops == 3 * 40 * (tower(64, 5) + tower(32, 16) + patches + heads)
    model = Clip.from_pretrained(folder).model
    embedded = sum(p.numel() for n, p in model.named_parameters() if "n_embedding.weight" in n)
    assert 0 < run.parameters == sum(p.numel() for p in model.parameters()) - embedded
    for broken in ({}, {"scores": {}}, [], {"scores": {"training/zero-shot/noun": None}}):
        (folder / "clip.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"no training/zero-shot/noun; run: dalle1 evaluate"):
            read_run(folder)


def test_a_training_of_another_kind_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "a" / "step-10"
    checkpoint.mkdir(parents=True)
    torch.save({"step": 10}, checkpoint / "state.pt")
    save_file({"x": torch.zeros(1)}, checkpoint / "training.safetensors")
    write_manifest(checkpoint, 10)
    with pytest.raises(ValueError, match="a trains no transformer and no CLIP; name trainings"):
        read_run(tmp_path / "a")


def test_runs_of_different_kinds_are_refused() -> None:
    other = runs()[0]._replace(measure="error of x")
    with pytest.raises(ValueError, match="runs measure error of x and nats per code, expected one"):
        analyse([*runs(), other], ScalingOptions(runs=()))


def test_the_command_fits_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = {run.name: run for run in runs(noise=0.003)}
    monkeypatch.setattr(fit_scaling, "read_run", lambda folder, field: points[folder.name])
    fit_scaling.main([*points, "--bootstrap", "2", "--out", str(tmp_path)])
    assert "measured" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "scaling.json").read_text())["runs"]) == 20
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(training(tmp_path / "a", []))
    for words, error in (
        ([str(tmp_path / "b")], "b holds no checkpoint, expected the folder of a training"),
        ([run], "has no validation/image; let the training validate"),
        ([run, "--hold-out", "-1"], "--hold-out is -1, expected 0 or more"),
        ([run, "--budget", "0"], "0, expected more than 0"),
        (
            [str(training(tmp_path / "c", [2.0]))],
            "--hold-out is 1 of 1 runs, expected fewer; name more",
        ),
        ([str(tmp_path / "c"), "--hold-out", "0"], "runs to fit are 1 different ones, expected 3"),
    ):
        with pytest.raises(SystemExit) as stop:
            fit_scaling.main([*words, "--out", str(tmp_path / "out")])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert error in message
        assert message.count("\n") == 1
