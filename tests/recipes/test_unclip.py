"""recipes/unclip.sh at a tiny size, from nothing to an upsampled image; then it resumes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dalle1.commands import sample

ROOT = Path(__file__).resolve().parents[2]
RUN = "--steps 1 --batch-size 2 --num-workers 0 --device cpu --precision fp32"
UNET = "--model.width 8 --model.multipliers 1 2 --model.blocks 1"
CROPS = f"{RUN} --crop-size 32 --validation-images 1"
FLAGS = {
    "DATA": "toybox:40",
    "AUTOENCODER_FLAGS": CROPS,
    "EMBED_FLAGS": "--num-workers 0 --device cpu",
    "PRIOR_FLAGS": f"{RUN} --model.width 16 --model.depth 1 --model.heads 2 --sampling-steps 1 "
    "--validation-pairs 2",
    "DECODER_FLAGS": f"{RUN} {UNET} --model.attention 8 --model.head-width 8 --validation-pairs 2",
    "UPSAMPLER_FLAGS": f"{CROPS} {UNET} --model.image-size 64",
}
STAGES = ["autoencoder", "embedded", "prior", "decoder", "upsampler", "model"]


def recipe(out: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **FLAGS, "OUT": str(out), "PYTHON": sys.executable, **changed}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    script = str(ROOT / "recipes" / "unclip.sh")
    return subprocess.run([script], env=environment, capture_output=True, text=True)


def stages(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [s.removeprefix("== ") for s in done.stdout.splitlines() if s.startswith("== ")]


@pytest.mark.slow
def test_the_recipe_trains_a_model_and_a_finished_stage_returns_at_once(tmp_path: Path) -> None:
    out = tmp_path / "unclip"
    first = recipe(out)
    assert first.returncode == 0, first.stdout + first.stderr
    assert stages(first) == STAGES
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors") if "model" not in p.parts}
    flags = ["--num-candidates", "1", "--steps", "1", "--upsampler-steps", "1", "--device", "cpu"]
    model = ["--model", str(out / "model"), "--out", str(tmp_path / "images")]
    sample.main(["a red star", *model, *flags])
    assert Image.open(tmp_path / "images" / "00.png").size == (256, 256)

    second = recipe(out, DECODER_FLAGS="--autoencoder nowhere")
    assert second.returncode == 2
    assert stages(second) == STAGES[:4]
    assert "no Autoencoder in nowhere" in second.stderr
    assert {p: p.stat().st_mtime_ns for p in made} == made
