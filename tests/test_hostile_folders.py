"""Model folders from strangers: nothing in them runs, leads out of them, or takes memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import save_whole_model

from dalle1 import DallE, model_files
from dalle1.clip import Clip
from dalle1.data.codes import COUNT_KEY, ENTRIES_NAME, CodeSource
from dalle1.model.transformer import Transformer
from dalle1.model_files import check_model_files
from dalle1.storage import MANIFEST_NAME, checkpoint_step, missing_from, model_folder
from dalle1.training.checkpoint import STATE_NAME, TENSORS_NAME, find_checkpoint
from dalle2.loading import load_pipeline

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uses links and pipes")
FILES = ["dvae.safetensors", "transformer.safetensors", "vocab.json", "words.json", "clip",
         "clip/config.json", "clip/model.safetensors", "clip/tokenizer.json"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    save_whole_model(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


class Marker:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    path = model / name
    os.rename(path, outside := tmp_path / f"outside{path.suffix}")
    path.symlink_to(outside)
    with pytest.raises(ValueError, match=rf"holds {name} is a link to .*, outside the folder"):
        load_pipeline(model, device="cpu")


@pytest.mark.parametrize("name", ["text-0", "text-0/config.json", "text-0/latest", "clip/step-9"])
def test_a_text_encoder_is_not_linked_from_elsewhere(
    model: Path, tmp_path: Path, name: str
) -> None:
    (outside := tmp_path / "outside").mkdir()
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(outside)
    with pytest.raises(ValueError, match=rf"holds {name} is a link to .*, outside the folder"):
        check_model_files(model)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "../../../etc/hostname"])
def test_a_link_to_anything_else_is_refused(model: Path, target: str) -> None:
    (model / "vocab.json").unlink()
    (model / "vocab.json").symlink_to(target)
    with pytest.raises(ValueError, match=r"vocab\.json is a link to .*, outside the folder"):
        load_pipeline(model, device="cpu")


@pytest.mark.parametrize("name", ["vocab.json", "transformer.safetensors", "clip/config.json"])
def test_a_pipe_is_refused_instead_of_waited_for(model: Path, name: str) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(ValueError, match=rf"holds {name} is a pipe or a device"):
        load_pipeline(model, device="cpu")


def in_cache(model: Path, cache: Path) -> Path:
    """Move a model into Hugging Face's cache: a link to a blob, and one to a link of hf-xet."""
    repository, shared = cache / "models--user--name", cache / "blobs" / "01"
    for folder in (repository / "blobs", repository / "snapshots", shared):
        folder.mkdir(parents=True)
    snapshot = repository / "snapshots" / "rev"
    os.rename(model, snapshot)
    for name, blob in (("words.json", "12"), ("transformer.safetensors", "34")):
        os.rename(snapshot / name, repository / "blobs" / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    os.rename(repository / "blobs" / "34", shared / "34")
    (repository / "blobs" / "34").symlink_to("../../blobs/01/34")
    return snapshot


@pytest.mark.parametrize("name", ["models--user--name", "models--user--name/blobs", "blobs"])
def test_a_cache_may_continue_on_another_disk(model: Path, tmp_path: Path, name: str) -> None:
    snapshot = in_cache(model, tmp_path / "hub")
    moved = tmp_path / "hub" / name
    os.rename(moved, tmp_path / "disk")
    moved.symlink_to(tmp_path / "disk")
    if name == "models--user--name":  # relative links of the moved folder
        (tmp_path / "blobs").symlink_to(tmp_path / "hub" / "blobs")
    if name == "models--user--name/blobs":
        (tmp_path / "disk" / "34").unlink()
        (tmp_path / "disk" / "34").symlink_to(tmp_path / "hub" / "blobs" / "01" / "34")
    check_model_files(snapshot)
    check_model_files(snapshot / "clip")


def test_blobs_of_other_downloads_are_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "hub" / "models--other--name" / "blobs" / "56"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (model / "vocab.json").unlink()
    (model / "vocab.json").symlink_to(other)
    message = r"vocab\.json is a link to .*56, outside the folder"
    with pytest.raises(ValueError, match=message):
        check_model_files(model)
    snapshot = in_cache(model, tmp_path / "hub")
    with pytest.raises(ValueError, match=message):
        check_model_files(snapshot)


def test_links_within_the_folder_and_into_the_cache_of_downloads_are_read(
    model: Path, tmp_path: Path
) -> None:
    os.rename(model / "vocab.json", model / "words-and-codes.json")
    (model / "vocab.json").symlink_to("words-and-codes.json")
    snapshot = in_cache(model, tmp_path / "hub")
    (tmp_path / "link").symlink_to(snapshot)
    loaded = load_pipeline(tmp_path / "link", device="cpu")
    assert isinstance(loaded, DallE)
    assert loaded.tokenizer.vocab_size == loaded.transformer.config.text_vocab


def test_text_without_end_is_not_read(model: Path) -> None:
    os.truncate(model / "vocab.json", model_files.MAX_TEXT + (1 << 20))  # takes no disk space
    with pytest.raises(ValueError, match=r"vocab\.json has 257 MiB of text, more than 256"):
        load_pipeline(model, device="cpu")


@pytest.mark.parametrize("name", ["generation.json", "model.safetensors.index.json"])
def test_endless_nesting_is_one_line(model: Path, name: str) -> None:
    if "index" in name:
        (model / "transformer.safetensors").unlink()
        name = "transformer.safetensors.index.json"
    (model / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        load_pipeline(model, device="cpu")


def test_a_manifest_without_end_is_that_of_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text("[" * 100_000)
    assert checkpoint_step(tmp_path) is None


def test_other_files_of_a_user_do_not_matter(model: Path) -> None:
    os.mkfifo(model / "notes")
    (model / "home").symlink_to("/")
    check_model_files(model)


def test_a_checkpoint_with_a_pipe_or_a_link_is_not_whole(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-3"
    shutil.copytree(whole, folder)
    os.mkfifo(folder / STATE_NAME)
    assert missing_from(folder, training=True) == "state.pt is a pipe or a device"
    with pytest.raises(ValueError, match=r"step-3 \(state\.pt is a pipe or a device\)"):
        find_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=r"holds log\.jsonl is a pipe"):
        find_checkpoint(tmp_path)


def test_an_index_leads_to_no_other_folder(model: Path, tmp_path: Path) -> None:
    os.rename(model / "transformer.safetensors", tmp_path / "other.safetensors")
    index = {"weight_map": {"a": "../other.safetensors", "b": "/etc/hostname"}}
    (model / "transformer.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lists '\.\./other\.safetensors', expected names of"):
        Transformer.load(model)


def test_the_index_of_a_clip_leads_to_no_other_folder(model: Path, tmp_path: Path) -> None:
    os.rename(model / "clip" / "model.safetensors", tmp_path / "other.safetensors")
    index = model / "clip" / "model.safetensors.index.json"
    for name in ("../../other.safetensors", str(tmp_path / "other.safetensors"), "config.json", 3):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"logit_scale": name}}))
        with pytest.raises(ValueError, match=r"index\.json lists .*, expected names of"):
            load_pipeline(model, device="cpu")


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/a.jinja"])
def test_templates_of_a_clip_lie_in_its_folder(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jinja").write_text("secret")
    template = model / "clip" / name
    template.parent.mkdir(exist_ok=True)
    template.symlink_to(tmp_path / "secret.jinja")
    for folder in (model, model / "clip"):
        with pytest.raises(ValueError, match=r"\.jinja is a link to .*, outside the folder"):
            check_model_files(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_as_a_clip_is_not_run(model: Path, tmp_path: Path, name: str) -> None:
    (model / "clip" / "model.safetensors").unlink()
    (model / "clip" / name).write_bytes(pickle.dumps(Marker(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"CLIP|safetensors"):
        load_pipeline(model, device="cpu")
    assert not (tmp_path / "run").exists()


def test_code_beside_a_clip_is_not_run(model: Path, tmp_path: Path) -> None:
    code = f"import os\nos.mkdir({str(tmp_path / 'run')!r})\nclass A: pass\n"
    (model / "clip" / "evil.py").write_text(code)
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.A")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        path = model / "clip" / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "auto_map": auto}))
    with suppress(ValueError):  # it may refuse such files
        Clip.from_pretrained(model / "clip")
    assert not (tmp_path / "run").exists()


def test_a_pickle_in_a_checkpoint_is_not_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "training" / "step-3"
    shutil.copytree(whole, folder)
    save_file({"a": torch.zeros(1)}, folder / TENSORS_NAME)
    torch.save({"step": 3, "resume_key": Marker(tmp_path / "run")}, folder / STATE_NAME)
    with pytest.raises(ValueError, match=r"no whole checkpoint to resume from: .*state\.pt is dam"):
        find_checkpoint(folder.parent)
    assert not (tmp_path / "run").exists()


def test_a_pickle_in_an_index_of_codes_is_not_run(tmp_path: Path) -> None:
    index = {"dvae": "0", COUNT_KEY: 1, "grid_size": 2, "shards": 1, "bytes": [10_240]}
    (tmp_path / "codes.json").write_text(json.dumps(index))
    (tmp_path / "00000.tar").write_bytes(bytes(10_240))
    (tmp_path / ENTRIES_NAME).write_bytes(pickle.dumps(Marker(tmp_path / "run")))
    assert len(CodeSource(tmp_path)) == 0  # a damaged index is built again, of the shards
    assert not (tmp_path / "run").exists()


def test_a_header_that_lies_takes_no_memory(model: Path) -> None:
    path = model / "transformer.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    for shape, offsets in (([1 << 40], [0, 1 << 42]), ([1 << 40], header[name]["data_offsets"])):
        header[name] |= {"shape": shape, "data_offsets": offsets}
        head = json.dumps(header).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])
        with pytest.raises(ValueError, match=r"transformer\.safetensors is damaged"):
            Transformer.load(model)


def test_a_folder_is_found_as_before(model: Path) -> None:
    assert model_folder(model) == model
