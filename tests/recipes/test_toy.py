"""recipes/toy.sh at a tiny size, from nothing to images; then it resumes, and stops at an error."""

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
DVAE = (
    f"{RUN} --model.image-size 64 --model.width 8 --model.codebook-size 16 --crop-size 32 "
    "--validation-images 1"
)
TRANSFORMER = (
    f"{RUN} --model.width 16 --model.depth 1 --model.heads 2 --model.text-len 8 "
    "--model.text-vocab 260 --vocab-captions 3 --prompts 'a red star'"
)
CLIP = (
    f"{RUN} --model.width 8 --model.text-width 32 --model.text-layers 1 --validation-pairs 1 "
    "--warmup-steps 0"
)
FLAGS = {
    "SCENES": "4",
    "FIRST_SIZES": "16 32",
    "DVAE_FLAGS": DVAE,
    "FINETUNE_FLAGS": DVAE,
    "ENCODE_FLAGS": "--num-workers 0 --device cpu",
    "TOY_16_FLAGS": TRANSFORMER,
    "TOY_32_FLAGS": TRANSFORMER,
    "TRANSFORMER_FLAGS": TRANSFORMER,
    "CLIP_FLAGS": f"{CLIP} --vocab-size 260 --vocab-captions 3",
    "NEGATIVES_FLAGS": CLIP,
    "CLASSIFIER_FLAGS": f"{RUN} --num-scenes 4 --validation-images 2",
}
STAGES = [
    *("scenes", "dvae", "toy-finetune", "codes-16", "toy-16", "codes-32", "toy-32", "codes"),
    *("transformer", "clip", "toy-negatives", "classifier", "model"),
]


def recipe(out: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **FLAGS, "OUT": str(out), "PYTHON": sys.executable, **changed}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [str(ROOT / "recipes" / "toy.sh")], env=environment, capture_output=True, text=True
    )


def stages(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [s.removeprefix("== ") for s in done.stdout.splitlines() if s.startswith("== ")]


@pytest.mark.slow
def test_the_recipe_trains_a_model_resumes_and_stops_at_an_error(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    first = recipe(out)
    assert first.returncode == 0, first.stdout + first.stderr
    assert stages(first) == STAGES
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors") if "model" not in p.parts}
    assert len(made) > 5  # what a second run must not write again
    flags = ["--device", "cpu", "--precision", "fp32", "--num-candidates", "1", "--num-images", "1"]
    model = ["--model", str(out / "model"), "--out", str(tmp_path / "images")]
    sample.main(["a red star", *model, *flags])
    assert Image.open(tmp_path / "images" / "00.png").size == (64, 64)

    second = recipe(out, TOY_32_FLAGS="--dvae nowhere")
    assert second.returncode == 2
    assert stages(second) == STAGES[: STAGES.index("toy-32") + 1]
    assert "no image tokenizer in nowhere" in second.stderr
    assert {p: p.stat().st_mtime_ns for p in made} == made
