"""The whole recipe on shards that are read front to back, at a tiny size, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dalle1.commands.toybox import main as write_toybox
from dalle1.data import encoded as codes
from dalle1.data.check import main as check
from dalle1.tasks import clip as train_clip
from dalle1.tasks import dvae as train_dvae
from dalle1.tasks import transformer as train_transformer

RUN = ["--steps", "3", "--batch-size", "4", "--device", "cpu", "--log-every", "1"]
TINY_DVAE = [
    *("--model.image-size", "64", "--model.width", "8", "--model.codebook-size", "16"),
    *("--crop-size", "32", "--validation-images", "2"),
]
TINY_TRANSFORMER = [
    *("--model.width", "16", "--model.depth", "2", "--model.heads", "2"),
    *("--model.text-len", "8", "--model.text-vocab", "260", "--prompts", "a red star"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in img2dataset's layout, and a dVAE that was trained on them through a pipe."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["--out", str(runs / "shards"), "--num-scenes", "60", "--size", "80"]
    write_toybox([*words, "--shard-size", "30"])
    flags = ["--data", piped(runs), "--out", str(runs / "dvae"), "--num-workers", "2"]
    train_dvae.main(["toy", *TINY_DVAE, *RUN, *flags])
    return runs


def piped(runs: Path) -> str:
    return f"pipe:cat {runs}/shards/{{00000..00001}}.tar"


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_dvae_is_trained_and_resumed(runs: Path) -> None:
    assert (runs / "dvae" / "latest" / "dvae.safetensors").is_file()
    flags = ["--data", piped(runs), "--num-workers", "2", "--schedule-steps", "3"]
    cut = [*flags, "--out", str(runs / "cut")]
    train_dvae.main(["toy", *TINY_DVAE, *RUN, *cut, "--steps", "1"])
    train_dvae.main(["toy", *TINY_DVAE, *RUN, *cut])
    whole = [line["total"] for line in log_of(runs / "dvae") if "total" in line]
    assert [line["total"] for line in log_of(runs / "cut") if "total" in line] == whole


def test_a_transformer_is_trained_on_codes_of_several_sources(runs: Path) -> None:
    dvae = ["--dvae", str(runs / "dvae"), "--device", "cpu", "--num-workers", "0"]
    codes.main([*dvae, "--data", piped(runs), "--out", str(runs / "far")])
    codes.main([*dvae, "--data", str(runs / "shards"), "--out", str(runs / "near")])
    mixed = f"{runs / 'far'}::2,{runs / 'near'}::1"
    flags = [*TINY_TRANSFORMER, *RUN, *dvae, "--data", mixed, "--out", str(runs / "model")]
    train_transformer.main(["toy", *flags])
    assert (runs / "model" / "latest" / "transformer.safetensors").is_file()


def test_a_transformer_and_a_clip_are_trained_on_images(runs: Path) -> None:
    flags = [*RUN, "--num-workers", "1", "--data", piped(runs)]
    dvae = ["--dvae", str(runs / "dvae"), "--out", str(runs / "from-images")]
    train_transformer.main(["toy", *TINY_TRANSFORMER, *flags, *dvae])
    train_clip.main(["toy", *flags, "--model.image-size", "64", "--out", str(runs / "clip")])
    for name in ("from-images", "clip"):
        assert len([line for line in log_of(runs / name) if "total" in line]) == 3


def test_check_reads_the_shards(runs: Path) -> None:
    check([piped(runs), "--out", str(runs / "check"), "--limit", "20", "--shown", "5"])
    report = json.loads((runs / "check" / "check.json").read_text())
    assert (report["pairs"], report["skipped"]) == (20, {})
    assert (report["width"]["median"], report["damaged"]) == (80, 0)
