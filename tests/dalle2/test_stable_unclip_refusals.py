"""What the exchange with StableUnCLIP refuses, and that it loses nothing."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_unclip import (
    tiny_decoder,
    tiny_stable_unclip,
    tiny_unclip,
)

from dalle2.exchange import autoencoder as importer
from dalle2.exchange import stable_unclip as command
from dalle2.exchange.parts import WEIGHTS, new_folder
from dalle2.exchange.schedulers import read_scheduler
from dalle2.exchange.stable_unclip import (
    lengths,
    read_stable_unclip,
    usual_length,
    write_stable_unclip,
)
from dalle2.pipeline import Unclip

CAPTION = "a red cube"


@pytest.fixture(scope="module")
def model() -> Unclip:
    return tiny_stable_unclip()


@pytest.fixture(scope="module")
def folder(model: Unclip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("exchange") / "pipeline"
    write_stable_unclip(model, found)
    return found


def test_models_that_a_pipeline_cannot_hold_are_refused(model: Unclip, tmp_path: Path) -> None:
    lacking = (
        ({"prior": None}, "no diffusion prior, expected one; use --prior FOLDER"),
        ({"text": None}, "no text encoder clip-text"),
        ({"image_tokenizer": tiny_unclip().image_tokenizer}, "expected one of dalle1 import vae"),
        ({"decoder": tiny_decoder(embedding_width=0)}, "reads no image embedding, expected one"),
        ({"decoder": tiny_decoder()}, "stable_diffusion is False, expected True"),
    )
    for parts, message in lacking:
        other = copy.copy(model)
        vars(other).update(parts)
        with pytest.raises(ValueError, match=message):
            write_stable_unclip(other, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_no_folder_with_something_in_it_is_written_to(
    model: Unclip, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/autoencoder.safetensors").write_text("mine")
    used = ["--out", str(tmp_path / "used")]
    with pytest.raises(ValueError, match=r"used holds autoencoder\.safetensors, expected"):
        write_stable_unclip(model, tmp_path / "used")
    for module, part in ((command, folder), (importer, folder / "vae")):
        with pytest.raises(SystemExit):
            module.main([str(part), *used])
        assert "used holds autoencoder.safetensors, expected a new" in capsys.readouterr().err
    assert [path.read_text() for path in (tmp_path / "used").iterdir()] == ["mine"]


SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "holds a FluxPipeline, expected"),
        (SCHEDULER, {"beta_end": 0.5}, "has beta_schedule scaled_linear, beta_start"),
        (SCHEDULER, {"prediction_type": ["v"]}, "and prediction_type ..v.., expected one of"),
        (SCHEDULER, {"num_train_timesteps": "a"}, "has num_train_timesteps 'a', expected 1 to"),
        (SCHEDULER, {"num_train_timesteps": 0}, "has num_train_timesteps 0, expected 1 to"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True, expected Fal"),
        (f"prior_{SCHEDULER}", {"beta_start": 0.3}, "has beta_schedule linear, beta_start 0.3"),
        (f"prior_{SCHEDULER}", {"prediction_type": "epsilon"}, "predicts epsilon, expected x0"),
        (f"image_noising_{SCHEDULER}", {"trained_betas": [0.5]}, "adds noise of variance 0.5"),
        (UNET, {"attention_head_dim": [1, 4]}, "heads are .16, 32. channels wide"),
        (UNET, {"addition_embed_type": "text_time"}, "expected None: ours has no"),
        (UNET, {"only_cross_attention": [["a"]]}, "only_cross_attention ...a..., expected False"),
        (UNET, {"flip_sin_to_cos": False}, "flip_sin_to_cos False, expected True"),
        (UNET, {"layers_per_block": 2}, "another architecture than expected"),
        (UNET, {"layers_per_block": 10**7}, "another architecture than expected"),
        (UNET, {"cross_attention_dim": 0}, "unet holds another architecture than expected"),
        (UNET, {"cross_attention_dim": 16}, "unet holds another architecture than expected"),
        (VAE, {"shift_factor": 0.1}, "shift_factor 0.1, expected None"),
        (VAE, {"layers_per_block": 3}, "another architecture than expected"),
        (VAE, {"block_out_channels": []}, "another architecture than expected"),
        (VAE, {"scaling_factor": None}, "vae holds another architecture than expected"),
        (VAE, {"scaling_factor": 0}, "scaling_factor is 0, expected more than 0"),
        ("prior/config.json", {"added_emb_type": None}, "added_emb_type None, expected prd"),
        ("prior/config.json", {"embedding_dim": 0}, "another architecture than expected"),
        ("prior/config.json", {"num_layers": 10**7}, "another architecture than expected"),
        ("prior/errors.json", [1.0], "errors are 1, expected 10 or none"),
    ],
)
def test_pipelines_of_other_architectures_are_refused(
    folder: Path, file: str, changes: Any, message: str, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "pipeline")
    path = tmp_path / "pipeline" / file
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, **changes} if isinstance(before, dict) else changes))
    with pytest.raises(ValueError, match=message):
        read_stable_unclip(tmp_path / "pipeline", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("mean", torch.zeros(1, 1), "of finite numbers, for the CLIP"),
        ("std", torch.zeros(2, 32), "of finite numbers, for the CLIP"),
        ("std", torch.full((1, 32), torch.nan), "of finite numbers, for the CLIP"),
        ("mean", None, "another architecture than expected .'mean'"),
    ],
)
def test_statistics_of_other_embeddings_are_refused(
    folder: Path, name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "pipeline")
    path = tmp_path / "pipeline/image_normalizer" / WEIGHTS
    tensors = load_file(path)
    save_file({k: v for k, v in {**tensors, name: tensor}.items() if v is not None}, path)
    with pytest.raises(ValueError, match=message):
        read_stable_unclip(tmp_path / "pipeline", tmp_path / "model")


def test_the_text_tower_tells_the_length_of_its_embeddings(
    model: Unclip, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "pipeline")
    path = tmp_path / "pipeline/prior_text_encoder/model.safetensors"
    clip, tensors = model.encoder, load_file(path)
    length, name = usual_length(clip), "text_projection.weight"
    assert length > 2
    assert lengths(folder, clip)[1] == pytest.approx(1, rel=1e-4)
    save_file({**tensors, name: tensors[name] * length}, path)  # as CLIP has it
    assert lengths(tmp_path / "pipeline", clip)[1] == pytest.approx(length, rel=1e-4)
    changed = {**tensors, "text_model.final_layer_norm.bias": torch.ones(32)}
    fewer = {name: tensors[name]}
    for wrong in (changed, fewer):
        save_file(wrong, path)
        with pytest.raises(ValueError, match="is a tower of another CLIP; name its own by --cl"):
            lengths(tmp_path / "pipeline", clip)
    path.unlink()
    with pytest.raises(ValueError, match=r"no file .*, expected the tower of a CLIP"):
        lengths(tmp_path / "pipeline", clip)


def write_new(folder: Path, *names: str, then: Callable[[], object]) -> None:
    """Write folders of these names to a new folder, after something else happens."""
    with new_folder(folder) as path:
        for name in names:
            (path / name).mkdir()
        then()


def test_an_interrupted_import_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls, out = os.rename, list[Path](), tmp_path / "out"

    def interrupt(source: Path | None = None, target: Path | None = None) -> None:
        if source is None or target is None or len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(source)
        rename(source, target)

    with pytest.raises(KeyboardInterrupt):
        write_new(out, "a", then=interrupt)
    assert not out.exists()
    with pytest.raises(ValueError, match="holds a, expected a new or empty folder"):
        write_new(out, "a", then=lambda: (out / "a").write_text("mine"))
    assert [(x.name, x.read_text()) for x in out.iterdir()] == [("a", "mine")]
    with pytest.raises(KeyboardInterrupt):
        write_new(tmp_path / "b", *"abc", then=lambda: monkeypatch.setattr(os, "rename", interrupt))
    assert calls
    assert not (tmp_path / "b").exists()


def test_schedulers_of_unclip_are_cosine(tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "UnCLIPScheduler", "prediction_type": "sample"})
    )
    found = {"schedule": "cosine", "times": 1000, "objective": "x0"}
    assert read_scheduler(tmp_path) == found


@pytest.mark.skipif(sys.platform == "win32", reason="uses links and pipes")
@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}", VAE, SCHEDULER, "tokenizer", "unet"])
def test_pipelines_lead_nowhere_else(folder: Path, file: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pipeline")
    path = tmp_path / "pipeline" / file
    path.rename(tmp_path / "elsewhere")
    with pytest.raises((ValueError, OSError), match=r"no folder|no part|[Nn]o such file"):
        read_stable_unclip(tmp_path / "pipeline", tmp_path / "model")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        read_stable_unclip(tmp_path / "pipeline", tmp_path / "model")
    path.unlink()
    if path.suffix:
        os.mkfifo(path)
        with pytest.raises(ValueError, match="is a pipe or a device"):
            read_stable_unclip(tmp_path / "pipeline", tmp_path / "model")
