"""Two processes train as one does, under every engine, and resume each other's checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import four_processes
import pytest
import torch
import two_processes
from launch import in_processes, in_two_processes
from safetensors.torch import load_file
from two_processes import HALF, RUNS, STEPS

from dalle1.model.transformer import Transformer
from dalle1.training.checkpoint import TENSORS_NAME, load_checkpoint
from dvae import DVAE, DVAEConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed"
)


def log_of(out: Path, field: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[field] for line in lines if field in line}


def half_of(run: Path, out: Path) -> Path:
    """Copy a run as it was at half its steps."""
    out.mkdir()
    shutil.copytree(run / f"step-{HALF}", out / f"step-{HALF}")
    (out / "latest").symlink_to(f"step-{HALF}")
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Train in one process, then everything in `RUNS` in two."""
    out = tmp_path_factory.mktemp("runs")
    two_processes.train(out / "one")
    two_processes.train(out / "one-muon", **RUNS["muon"])
    two_processes.train_scaled(out / "scaled")
    half_of(out / "one", out / "zero3-resumed")
    return out, in_two_processes(two_processes.__file__, out)


INEXACT = ("bf16", "stopped", "skipping", "muon")
EXACT = [
    name for name in RUNS if not (name.endswith(INEXACT) or name.startswith(("powersgd", "plain-")))
]


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_learn_what_one_does(runs: tuple[Path, list[str]], name: str) -> None:
    out, steps = runs[0], RUNS[name].get("steps", STEPS)
    begin = HALF + 1 if name.endswith("resumed") else 1
    for field in ("total", "text", "image", "gradient_norm", "learning_rate"):
        expected, got = log_of(out / "one", field), log_of(out / name, field)
        assert list(got) == list(range(begin, steps + 1))
        assert got == pytest.approx({step: expected[step] for step in got}, rel=1e-5)
    expected = load_file(out / f"one/step-{steps}" / TENSORS_NAME) if steps == STEPS else {}
    got = load_file(out / name / "latest" / TENSORS_NAME)
    assert len(got) == 4 * len([*Transformer(two_processes.SIZE).parameters()])
    for key in expected:
        # The gradient of the keys' biases is 0 but for rounding, which AdamW makes large.
        torch.testing.assert_close(got[key], expected[key], rtol=1e-3, atol=1e-4)
    if begin == 1 and steps == STEPS:
        validations = [log_of(out / run, "validation/loss") for run in ("one", name)]
        assert validations[1] == pytest.approx(validations[0], rel=1e-5)


def test_two_processes_orthogonalise_as_one_does(runs: tuple[Path, list[str]]) -> None:
    one, two = (runs[0] / name for name in ("one-muon", "muon"))
    for field in ("total", "gradient_norm"):
        assert log_of(two, field) == pytest.approx(log_of(one, field), rel=1e-4)
    expected, got = (load_file(out / "latest" / TENSORS_NAME) for out in (one, two))
    assert got.keys() == expected.keys()
    for key in expected:  # in bf16, what is nearly alike may be rounded apart
        largest = float(expected[key].abs().max())
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0.02 * largest)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_features_of_all_processes_are_compared(runs: tuple[Path, list[str]], stage: int) -> None:
    folders = [runs[0] / run for run in ("scaled", f"scaled{stage}")]
    expected, got = (load_file(folder / "latest" / TENSORS_NAME) for folder in folders)
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-3, atol=1e-5)
    losses = [log_of(folder, "total") for folder in folders]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name", ["zero2-bf16", "zero3-bf16"])
def test_bf16_weights_learn_nearly_that(runs: tuple[Path, list[str]], name: str) -> None:
    expected, got = log_of(runs[0] / "one", "total"), log_of(runs[0] / name, "total")
    assert got == pytest.approx({step: expected[step] for step in range(1, 6)}, rel=1e-2)
    kept = load_file(runs[0] / name / "latest" / TENSORS_NAME)[
        "weights/layers.0.mlp.branch.up.weight"
    ]
    assert not torch.equal(kept, kept.bfloat16().float())  # the fp32 ones of the shares


@pytest.mark.parametrize("name", RUNS)
def test_every_checkpoint_is_a_model(runs: tuple[Path, list[str]], name: str) -> None:
    folder = runs[0] / name / "latest"
    kept = load_file(folder / TENSORS_NAME)
    for kind, path in (("average", folder), ("weights", folder / "raw")):
        for parameter, value in Transformer.load(path).named_parameters():
            assert torch.equal(value, kept[f"{kind}/{parameter}"]), parameter


def test_one_process_resumes_where_two_stopped(
    runs: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = half_of(runs[0] / "zero3", tmp_path / "resumed")
    two_processes.train(out)
    expected, got = log_of(runs[0] / "zero3", "total"), log_of(out, "total")
    assert list(got) == list(range(HALF + 1, STEPS + 1))
    assert got == pytest.approx({step: expected[step] for step in got}, rel=1e-5)


def test_a_signal_to_any_process_stops_all(runs: tuple[Path, list[str]]) -> None:
    out, printed = runs
    assert os.readlink(out / "zero3-stopped/latest") == "step-3"
    assert "Stopped at step 3" in printed[0]
    assert "Stopped" not in printed[1]


def test_all_processes_skip_an_update_that_is_nan_in_one(runs: tuple[Path, list[str]]) -> None:
    out = runs[0] / "zero3-skipping"
    assert log_of(out, "skipped_updates") == {3: 1, 4: 1}
    state = load_checkpoint(out)
    assert state is not None
    assert state["updates"] == 3
    assert all(t.isfinite().all() for t in load_file(out / "latest" / TENSORS_NAME).values())


def test_a_recipe_is_trained_in_two_processes_that_share_all_weights(tmp_path: Path) -> None:
    size = DVAEConfig(image_size=32, width=8, codebook_size=16, code_width=8, blocks_per_group=1)
    DVAE(size).save(tmp_path / "dvae")
    two_processes.keep_nothing_whole(tmp_path / "apart.json")
    tiny = "--model.width 16 --model.depth 2 --model.heads 2 --model.text-len 8"
    run = "--steps 2 --batch-size 4 --num-workers 0 --device cpu --data toybox:16"
    train = ["train_transformer.py", "toy", *tiny.split(), *run.split()]
    folders = ["--dvae", tmp_path / "dvae", "--deepspeed", tmp_path / "apart.json"]
    folders += ["--out", tmp_path / "out", "--model.text-vocab", 260, "--vocab-captions", 4]
    in_two_processes(*train, *folders, "--prompts", "a red star", "--optimizer", "adamw")
    assert (tmp_path / "out/samples/step-2.png").exists()
    assert log_of(tmp_path / "out", "validation/image").keys() == {2}
    assert Transformer.load(tmp_path / "out").config.depth == 2
    size = "--crop-size 32 --model.image-size 32 --model.width 8 --model.codebook-size 16"
    folders = ["--deepspeed", tmp_path / "apart.json", "--out", tmp_path / "dvae2"]
    in_two_processes("train_dvae.py", "toy", *size.split(), *run.split(), *folders)
    assert (tmp_path / "dvae2/samples/step-2.png").exists()


def test_only_the_main_process_prints(runs: tuple[Path, list[str]]) -> None:
    assert f"Resuming at step {HALF} of {STEPS}" in runs[1][0]
    assert "step" not in runs[1][1]


def test_powersgd_resumes_to_the_last_digit(runs: tuple[Path, list[str]]) -> None:
    whole, resumed = (runs[0] / name for name in ("powersgd", "powersgd-resumed"))
    tensors = [load_file(run / "latest" / TENSORS_NAME) for run in (whole, resumed)]
    assert tensors[0].keys() == tensors[1].keys()
    assert [name for name in tensors[0] if not tensors[0][name].equal(tensors[1][name])] == []
    errors = [tensors[0][f"powersgd/error/0/{rank}"] for rank in (0, 1)]
    assert 0 < float(errors[0].norm()) != float(errors[1].norm())
    assert list(log_of(resumed, "total")) == [*range(6, 11)]


def test_powersgd_changes_updates_after_the_warm_up_alone(runs: tuple[Path, list[str]]) -> None:
    plain, compressed = (log_of(runs[0] / name, "total") for name in ("plain-10", "powersgd"))
    assert all(compressed[i] == plain[i] for i in (1, 2, 3))
    assert all(compressed[i] != plain[i] for i in (4, 5, 6))
    assert compressed[10] < 0.97 * compressed[3]


def test_powersgd_survives_a_gradient_that_is_not_finite(runs: tuple[Path, list[str]]) -> None:
    log = log_of(runs[0] / "powersgd-skipping", "total")
    assert [step for step, total in log.items() if total != total] == [3]


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and resume everything in `four_processes.RUNS`."""
    out = tmp_path_factory.mktemp("four")
    printed = in_processes(4, four_processes.__file__, out)
    assert "find_unused_parameters" not in "".join(printed)  # advice that would undo it
    return out


@pytest.mark.parametrize("name", four_processes.RUNS)
def test_four_processes_resume_to_the_last_digit(of_four: Path, name: str) -> None:
    files = [of_four / run / "latest" / TENSORS_NAME for run in (name, f"{name}-resumed")]
    whole, resumed = map(load_file, files)
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not whole[key].equal(resumed[key])] == []
    steps = range(four_processes.HALF + 1, four_processes.STEPS + 1)
    assert list(log_of(of_four / f"{name}-resumed", "total")) == [*steps]
