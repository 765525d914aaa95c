"""Folders of CLIP: both families are loaded and saved, and what is damaged is one line."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from small_clip import noise_images, small_clip
from tiny_model import CAPTIONS
from torch import nn

import dalle1.clip
from dalle1.clip import Clip


@pytest.fixture(scope="module")
def clip() -> Clip:
    return small_clip()


@pytest.fixture(scope="module")
def folder(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "saved"
    clip.save_pretrained(path)
    return path


def test_transformers_itself_loads_what_is_saved(clip: Clip, folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        inputs = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
        text = model.get_text_features(**inputs).pooler_output
        pixels = processor(images=noise_images(), input_data_format="channels_last")["pixel_values"]
        image = model.get_image_features(torch.stack(list(map(torch.as_tensor, pixels))))
    torch.testing.assert_close(F.normalize(text, dim=-1), clip.embed_text(CAPTIONS))
    torch.testing.assert_close(
        F.normalize(image.pooler_output, dim=-1), clip.embed_images(noise_images())
    )


def test_saved_clips_come_back_the_same(clip: Clip, folder: Path, tmp_path: Path) -> None:
    loaded = Clip.from_pretrained(folder)
    expected = clip.score("a red cube", noise_images())
    torch.testing.assert_close(loaded.score("a red cube", noise_images()), expected)
    assert not loaded.model.training
    half = tmp_path / "half"
    for _ in range(2):  # the second replaces the first
        loaded.save_pretrained(half, dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
    size = (half / "model.safetensors").stat().st_size
    assert size < 0.6 * (folder / "model.safetensors").stat().st_size
    again = Clip.from_pretrained(half)
    assert again.model.dtype == torch.float32
    torch.testing.assert_close(
        again.score("a red cube", noise_images()), expected, atol=1e-2, rtol=0
    )


def write_folder(path: Path, family: str, clip: Clip) -> Path:
    """Write a tiny random model of a family with transformers' own classes."""
    import transformers as hf

    text = {"vocab_size": 310, "max_position_embeddings": 16, "projection_size": 16}
    text |= {"bos_token_id": 300, "eos_token_id": clip.tokenizer.eos_token_id, "pad_token_id": 0}
    tower = {"hidden_size": 16, "intermediate_size": 32}
    tower |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 24, "patch_size": 8}
    config = getattr(hf, f"{family}Config")(text_config=text | tower, vision_config=vision | tower)
    getattr(hf, f"{family}Model")(config).save_pretrained(path)
    clip.tokenizer.save_pretrained(path)
    settings = {
        "image_processor_type": f"{family}ImageProcessor",
        "size": {"height": 24, "width": 24} if family == "Siglip" else {"shortest_edge": 24},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
    }
    if family == "CLIP":
        settings["crop_size"] = {"height": 24, "width": 24}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_transformers_models_of_both_families_score(
    family: str, clip: Clip, tmp_path: Path
) -> None:
    loaded = Clip.from_pretrained(write_folder(tmp_path / family, family, clip))
    assert (loaded.image_size, loaded.text_len) == (24, 16)
    scores = loaded.score("a red cube", noise_images())
    assert scores.shape == (4,)
    assert torch.isfinite(scores).all()
    # The folder's own mean and deviation, and the crop, reach the pixels.
    pixels = loaded.preprocess([Image.new("RGB", (30, 24), (255, 0, 51))])
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = (torch.tensor([1.0, 0.0, 0.2]) - mean) / std
    torch.testing.assert_close(pixels, expected[None, :, None, None].expand(1, 3, 24, 24))
    assert loaded.tokenize(["a"])["input_ids"].shape[1] == (16 if family == "Siglip" else 3)


def test_siglip_embeddings_are_transformers_own(clip: Clip, tmp_path: Path) -> None:
    from transformers import SiglipModel

    path = write_folder(tmp_path / "siglip", "Siglip", clip)
    loaded, model = Clip.from_pretrained(path), SiglipModel.from_pretrained(path)
    ids = loaded.tokenize(CAPTIONS)["input_ids"]
    with torch.inference_mode():
        output = model(input_ids=ids, pixel_values=loaded.preprocess(noise_images()))
    torch.testing.assert_close(output.text_embeds, loaded.embed_text(CAPTIONS))
    torch.testing.assert_close(output.image_embeds, loaded.embed_images(noise_images()))


def one_line(name: str | Path) -> str:
    with pytest.raises(ValueError, match="CLIP") as caught:
        Clip.from_pretrained(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bad_name_is_one_line(tmp_path: Path) -> None:
    assert "the folder does not exist" in one_line(tmp_path / "missing")
    assert "the folder does not exist" in one_line("a/path/to/nothing")
    assert "nobody/no-such-clip" in one_line("nobody/no-such-clip")  # offline: conftest.py
    assert str(tmp_path) in one_line(tmp_path)  # an empty folder


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_one_tower_alone_is_named(family: str, clip: Clip, tmp_path: Path) -> None:
    import transformers as hf

    whole = write_folder(tmp_path / "whole", family, clip)
    for part, missing in (("text", "image"), ("vision", "text")):
        path = tmp_path / part
        shutil.copytree(whole, path)
        config = getattr(hf, f"{family}Config").from_pretrained(whole)
        getattr(config, f"{part}_config").save_pretrained(path)
        assert f"and no {missing} tower" in one_line(path)


def copied(folder: Path, path: Path, *removed: str) -> Path:
    shutil.copytree(folder, path)
    for name in removed:
        (path / name).unlink()
    return path


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    both = ("tokenizer.json", "tokenizer_config.json")
    message = one_line(copied(folder, tmp_path / "a", *both))
    assert "has no tokenizer.json" in message
    message = one_line(copied(folder, tmp_path / "b", *both, "preprocessor_config.json"))
    assert "has no tokenizer.json and no preprocessor_config.json" in message
    (copied(folder, tmp_path / "c", "tokenizer.json") / "spiece.model").touch()
    assert "pip install sentencepiece" in one_line(tmp_path / "c")
    assert "the folder does not exist" in one_line("nowhere")


def test_a_tokenizer_that_encodes_all_captions_alike_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    path = copied(folder, tmp_path / "a")
    words = tokenizers.models.WordLevel({"?": 0}, unk_token="?")
    tokenizers.Tokenizer(words).save(str(path / "tokenizer.json"))
    assert "encodes different captions alike" in one_line(path)


def test_a_processor_that_does_not_crop_is_refused(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, tmp_path / "a")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    settings["do_center_crop"] = False
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert "turns 40 × 3 pixels into" in one_line(path)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_weights_that_are_no_numbers_are_found_by_loading(
    clip: Clip, tmp_path: Path, tower: str
) -> None:
    broken = copy.deepcopy(clip)
    with torch.no_grad():
        next(getattr(broken.model, f"{tower}_model").parameters()).fill_(math.nan)
    broken.save_pretrained(tmp_path / "nan")
    assert "features are nan or infinite in fp32" in one_line(tmp_path / "nan")


def test_threads_load_at_once_and_leave_torch_and_loggers_as_they_were(folder: Path) -> None:
    from transformers import PreTrainedModel

    def state() -> list[object]:
        initializers = [getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_")]
        levels = [logging.getLogger(name).level for name in ("transformers", "huggingface_hub")]
        return [*initializers, torch.linspace, PreTrainedModel.tie_weights, *levels]

    Clip.from_pretrained(folder)
    before = state()
    with ThreadPoolExecutor(4) as pool:
        clips = list(pool.map(Clip.from_pretrained, [folder] * 8))
    assert state() == before
    assert len({float(c.embed_text(["a red cube"]).sum()) for c in clips}) == 1


def test_siglip_2_reads_lower_case(clip: Clip, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "siglip", "Siglip", clip)
    bpe = json.loads((path / "tokenizer.json").read_text())
    bpe["normalizer"] = None
    (path / "tokenizer.json").write_text(json.dumps(bpe))
    config = json.loads((path / "tokenizer_config.json").read_text())
    for lower in (False, True):
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": lower}))
        loaded = Clip.from_pretrained(path)
        upper, plain = (loaded.tokenize([x])["input_ids"] for x in ("A Red Cube", "a red cube"))
        assert torch.equal(upper, plain) == lower


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "incomplete":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["logit_scale"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "another model":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif how == "another tokenizer":  # JSON as it should be, and not what tokenizers expects
        (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "incomplete",
        "another model",
        "another tokenizer",
        "no tokenizer",
        "no processor",
    ],
)
def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    damage(path, how)
    message = one_line(path)
    assert str(path) in message
    if how == "incomplete":
        assert "logit_scale" in message
    if how == "another model":
        assert "'bert'" in message


def test_a_processor_that_does_not_fit_its_model_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    settings = json.loads((path / "preprocessor_config.json").read_text())
    settings["crop_size"] = {"height": 48, "width": 48}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert "image processor" in one_line(path)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_scale_is_saved_at_100_at_most(
    clip: Clip, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    wild = copy.deepcopy(clip)
    for scale, saved in ((130.0, 100.0), (33.3, 33.3)):
        wild.model.logit_scale.data.fill_(math.log(scale))
        wild.save_pretrained(tmp_path, dtype)
        loaded = Clip.from_pretrained(tmp_path)
        assert loaded.model.logit_scale.exp().item() == pytest.approx(saved, rel=1e-6)
        assert wild.model.logit_scale.exp().item() == pytest.approx(scale, rel=1e-6)


def test_loading_leaves_logging_as_it_was(folder: Path, capfd: pytest.CaptureFixture) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    Clip.from_pretrained(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_the_module_alone_does_not_load_transformers() -> None:
    import subprocess

    code = "import sys, dalle1.clip; sys.exit('transformers' in sys.modules)"
    root = Path(dalle1.clip.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
