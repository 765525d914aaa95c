"""The whole recipe in a row, tiny: what each start says, stopping, going on, and drawing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import train_toy
from dalle1 import DallE
from dalle1.commands import evaluate

ROOT = Path(__file__).resolve().parent.parent
RUN = "--batch-size 2 --num-workers 0 --device cpu --save-every 1 --log-every 1"
DVAE = (
    f"{RUN} --steps 2 --model.image-size 64 --model.width 8 --model.codebook-size 16 "
    "--crop-size 32 --validation-pictures 1"
)
TRANSFORMER = (
    f"{RUN} --steps 2 --model.width 16 --model.depth 2 --model.heads 2 "
    "--model.text-vocab 260 --vocab-captions 3 --prompts 'a red star'"
)
TINY = {
    "--scenes": "4",
    "--dvae": DVAE,
    "--settle": DVAE,
    "--half": f"{TRANSFORMER} --image-size 32",
    "--transformer": TRANSFORMER,
    "--clip": f"{RUN} --steps 2 --model.width 8 --model.text-width 32 --model.text-layers 1 "
    "--vocab-size 260 --vocab-captions 3 --validation-pairs 1",
    "--classifier": "--steps 1 --num-scenes 4 --validation-images 2 --batch-size 4 "
    "--precision fp32",
}


def words(out: Path, **changed: str) -> list[str]:
    flags = {"--out": str(out), **TINY, **{f"--{name}": value for name, value in changed.items()}}
    return [f"{flag}={value}" for flag, value in flags.items()]


def stopped(flags: Sequence[str], begun: Callable[[], bool]) -> str:
    """Stop the recipe by SIGTERM once it has begun; give what it says, when all of it is gone."""
    command = [sys.executable, str(ROOT / "train_toy.py"), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None and not begun():
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=60)[1]
    assert child.returncode == 143
    return said


def refused(
    out: Path, capfd: pytest.CaptureFixture[str], old: str, why: str, **changed: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_toy.main(words(out, **changed))
    said = capfd.readouterr()
    assert f"in {out}, {old}: made from other stages than this command's ({why})" in said.err
    assert not said.out  # before anything runs


def test_the_recipe_goes_on_wherever_it_was_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = TINY["--dvae"].replace("--steps 2", "--steps 100000 --schedule-steps 2")
    log = tmp_path / "dvae" / "log.jsonl"
    said = stopped(words(tmp_path, dvae=long), lambda: log.exists() and bool(log.read_text()))
    assert "The same command goes on" in said
    assert not (tmp_path / "codes").exists()  # of a dVAE that is half trained
    reached = train_toy.step_of(tmp_path / "dvae")
    assert 0 < reached < 100_000
    capfd.readouterr()

    enough = TINY["--dvae"].replace("--steps 2", f"--steps {reached + 1} --schedule-steps 2")
    train_toy.main(words(tmp_path, dvae=enough))
    printed = capfd.readouterr().out
    assert "scenes       shard 1 of 1: done" in printed
    assert f"dvae         step {reached:,} of {reached + 1:,}: under way" in printed
    assert "transformer  step 0 of 2: to do" in printed
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, reached + 2))

    train_toy.main(words(tmp_path, dvae=enough))
    assert capfd.readouterr().out.count(": done") == 9
    model = str(tmp_path / "model")
    assert DallE.from_pretrained(model, device="cpu").clip is not None

    # A dVAE that goes on would leave codes and transformer behind; so would another one.
    further = TINY["--dvae"].replace("--steps 2", f"--steps {reached + 2}")
    why = f"dvae step {reached + 1:,} of {reached + 2:,}: under way"
    refused(tmp_path, capfd, "settle, half-codes, codes, half, transformer", why, dvae=further)
    longer = TINY["--half"].replace("--steps 2", "--steps 3")
    why = "half step 2 of 3: under way"
    refused(tmp_path, capfd, "transformer", why, dvae=enough, half=longer)
    index = tmp_path / "half-codes" / "codes.json"
    kept = index.read_text()
    index.write_text(json.dumps({**json.loads(kept), "dvae": "another"}))
    why = "half-codes has another dVAE than settle"
    refused(tmp_path, capfd, "half-codes, half, transformer", why, dvae=enough)
    index.write_text(kept)
    drawn = tmp_path / "transformer" / "latest" / "dvae.safetensors"
    whole = drawn.read_bytes()
    drawn.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    why = "transformer has another dVAE than settle"
    refused(tmp_path, capfd, "transformer", why, dvae=enough)
    drawn.write_bytes(whole)

    # Codes that made room are made again, and no transformer suffers.
    shutil.rmtree(tmp_path / "codes")
    train_toy.main(words(tmp_path, dvae=enough, only="codes"))
    assert "codes        shard 0 of 1: to do" in capfd.readouterr().out

    # The proof takes what was trained as it is: nothing is right, but all is counted.
    few = ["--num-prompts", "2", "1", "--best-of", "1", "2", "--classifier-images", "2"]
    classifier = ["--classifier", f"{model}/classifier.safetensors"]
    evaluate.main(["toybox", "--model", model, *classifier, *few, "--out", str(tmp_path / "proof")])
    scores = json.loads((tmp_path / "proof" / "toybox.json").read_text())["scores"]
    assert 0 <= scores["heldout/all/best of 2/all"] <= 1
    assert 0 <= scores["train/one/best of 1/noun"] <= 1


@pytest.mark.parametrize(
    ("first", "second", "flag"),
    [("dvae", "settle", "--model.codebook-size 32"), ("half", "transformer", "--model.depth 3")],
)
def test_parts_of_one_size_are_asked_for_before_hours_of_the_first(
    first: str, second: str, flag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    larger = f"{TINY[f'--{first}']} {flag}"
    with pytest.raises(SystemExit, match="2"):
        train_toy.main(words(tmp_path, **{first: larger}))
    said = capfd.readouterr().err
    assert f"{second} goes on from {first}, but its model differs" in said
    assert f"give --{first} and --{second} the same --model flags" in said


def test_scenes_are_stopped_in_all_processes(tmp_path: Path) -> None:
    flags = words(tmp_path, scenes="3000", only="scenes")
    partial = (tmp_path / "scenes").glob
    said = stopped(flags, lambda: any(file.stat().st_size for file in partial(".*.partial")))
    assert "scenes       shard 0 of 3: to do\nThe same command goes on." in said


STOPS_AT_ITS_END = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.kill(os.getppid(), int(sys.argv[2]))
time.sleep(0.2)
pathlib.Path(sys.argv[1]).touch()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_end_of_a_stage_counts(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(name: train_toy.Name) -> train_toy.Stage:
        made = tmp_path / name
        command = ["-c", STOPS_AT_ITS_END, str(made), str(int(number))]
        return train_toy.Stage(name, command, lambda: int(made.exists()), 1, "step")

    monkeypatch.setattr(train_toy, "FOLLOWS", {})
    monkeypatch.setattr(train_toy, "stages", lambda _: [stage("dvae"), stage("settle")])
    for code, reached in ((128 + number, ["dvae"]), (128 + number, ["dvae", "settle"])):
        with pytest.raises(SystemExit) as stop:
            train_toy.main(["--out", str(tmp_path)])
        assert stop.value.code == code
        assert sorted(file.name for file in tmp_path.iterdir()) == reached


def test_codes_wait_for_the_dvae(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_toy.main(words(tmp_path, only="codes"))
    assert "codes needs all of settle; in" in (said := capfd.readouterr().err)
    assert "settle step 0 of 2: to do" in said


def test_stages_run_as_their_commands_are_given(tmp_path: Path) -> None:
    more = {"clip": "--steps 7", "classifier": "--steps=8 --num-scenes 4"}
    config = train_toy.ToyConfig(out=tmp_path, scenes=2500, processes=2, **more)
    found = {stage.name: stage for stage in train_toy.stages(config)}
    assert [(s.total, s.done()) for s in found.values()] == [
        *((3, 0), (14_000, 0), (2_000, 0), (3, 0), (3, 0)),
        *((5_000, 0), (1_400, 0), (7, 0), (8, 0)),
    ]
    launched = [name for name, stage in found.items() if "torch.distributed.run" in stage.command]
    assert launched == ["half", "transformer"]
    assert "--nproc-per-node=2" in found["transformer"].command
    assert found["codes"].command[-1] == str(tmp_path / "codes")


def test_a_stage_that_fails_ends_the_recipe(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train_toy.main(words(tmp_path, dvae=f"{DVAE} --data nowhere", only="dvae"))
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert "no data at 'nowhere'" in said
    assert "dvae         step 0 of 2: to do" in said
    assert "goes on" not in said
