"""recipes/conditionings.sh at a tiny size: a decoder for each preset, and one table; it resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle2.unet import UNet

ROOT = Path(__file__).resolve().parents[2]
RUN = "--steps 1 --batch-size 2 --num-workers 0 --device cpu --precision fp32"
FLAGS = {
    "DATA": "toybox:40",
    "PRESETS": "imagen sdxl small",
    "AUTOENCODER_FLAGS": f"{RUN} --crop-size 32 --validation-images 1",
    "EMBED_FLAGS": "--num-workers 0 --device cpu",
    "DECODER_FLAGS": f"{RUN} --model.width 8 --model.multipliers 1 2 --model.blocks 1 "
    "--model.attention 8 --model.head-width 8 --validation-pairs 2",
    "PRIOR_FLAGS": f"{RUN} --model.width 16 --model.depth 1 --model.heads 2 --validation-pairs 2",
    "WAYS_FLAGS": "--num-prompts 1 --num-candidates 1 --ways steps=1 --device cpu",
}


def recipe(out: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **FLAGS, "PYTHON": sys.executable}
    environment |= {"OUT": str(out / "decoders"), "UNCLIP": str(out / "unclip"), **changed}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    script = str(ROOT / "recipes" / "conditionings.sh")
    return subprocess.run([script], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_recipe_trains_each_preset_and_compares_them(tmp_path: Path) -> None:
    first = recipe(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    decoders = tmp_path / "decoders"
    scores = json.loads((decoders / "ways/ways.json").read_text())["scores"]
    names = {"imagen": 1, "sdxl": 2, "unclip": 0}
    for name, count in names.items():
        assert len(UNet.config_of(decoders / name).text_encoders) == count
        assert 0 <= scores[f"{decoders / name}/correct"] <= 1
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    second = recipe(tmp_path, PRESETS="sdxl", SDXL_FLAGS="--text-encoders nothing")
    assert second.returncode == 2
    assert "text encoder is 'nothing', expected KIND:WHERE" in second.stderr
    assert {p: p.stat().st_mtime_ns for p in made} == made

    start = {"INIT": str(decoders / "imagen"), "OUT": str(tmp_path / "again"), "PRESETS": "ldm"}
    third = recipe(tmp_path, **start)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "== autoencoder" not in third.stdout
    before, after = (UNet.load(x) for x in (decoders / "imagen", tmp_path / "again" / "ldm"))
    kernels = [model.get_parameter("down.0.block.conv_in.weight") for model in (before, after)]
    torch.testing.assert_close(*kernels, atol=0.02, rtol=0)
