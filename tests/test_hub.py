"""Models on Hugging Face, tested against a stand-in that runs on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer, hub_server
from huggingface_hub import constants

from dalle1 import export
from dalle1.commands import sample
from dalle1.data.spec import data_name
from dalle1.hub import MODEL_FILES, find_model
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.model_card import INFO_NAME, ModelInfo
from dalle1.pipeline import BUNDLED, DallE
from dalle1.sampling.generation import GENERATION_NAME
from dalle1.text.bpe import Tokenizer
from dvae import DVAE, DVAEConfig

REPO = "user/tiny"


@pytest.fixture(scope="module")
def model() -> DallE:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red cube"], 260)
    sizes = {"text_vocab": tokenizer.vocab_size, "codebook_size": 20, "grid_size": 2}
    config = TransformerConfig(text_len=8, width=32, depth=1, heads=2, **sizes)
    dvae = DVAE(DVAEConfig(image_size=16, width=8, codebook_size=20, code_width=12)).eval()
    return DallE(dvae, Transformer(config).eval(), tokenizer)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Point huggingface_hub to a stand-in and to a cache of its own."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


def test_a_model_is_published_and_used_by_name(
    model: DallE, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.info = ModelInfo(license="mit", data="toybox", steps=1400, batch_size=16)
    url = model.push_to_hub(REPO)
    assert url == f"{hub.url}/{REPO}"
    files = hub.files[REPO]
    weights = {"transformer.safetensors", "dvae.safetensors"}
    others = {".gitattributes", "README.md", "vocab.json", "words.json", "model_info.json"}
    assert files.keys() == weights | others

    _, metadata, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "dalle1",
        "license": "mit",
        "pipeline_tag": "text-to-image",
        "tags": ["dalle", "text-to-image"],
    }
    assert f"--model {REPO}" in text
    assert "| Training | 1,400 updates of 16 pairs |" in text

    files["huge-of-another-library.bin"] = b"unread"
    loaded = DallE.from_pretrained(REPO, device="cpu")
    assert loaded.info == model.info
    before, after = (m.transformer.state_dict() for m in (model, loaded))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any("huge" in request for request in hub.requests)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # from the cache
    sample.main(["a red cube", "--model", REPO, "--precision", "fp32", "--num-candidates", "1",
        "--out", str(tmp_path / "out")])  # fmt: skip
    assert json.loads((tmp_path / "out" / "scores.json").read_text())

    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / REPO)
    assert find_model(REPO) == Path(REPO)  # a folder takes precedence


def test_a_new_upload_replaces_the_model_and_keeps_an_edited_card(
    model: DallE, hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard, index = "transformer-00001-of-00002.safetensors", "transformer.safetensors.index.json"
    mine = {"README.md": b"edited", "examples.png": b"", shard: b"", index: b"{}"}
    hub.files[REPO] = dict(mine)
    model.save_pretrained(tmp_path / "model")
    export.main(["--model", str(tmp_path / "model"), "--push-to-hub", REPO, "--license", "cc0-1.0"])
    assert f"The model is at {hub.url}/{REPO}; sample with" in capsys.readouterr().out
    files = hub.files[REPO]
    assert files["README.md"] == b"edited"
    assert "examples.png" in files
    assert not {shard, index} & files.keys()
    assert json.loads(files["model_info.json"])["license"] == "cc0-1.0"
    assert len(files["transformer.safetensors"]) < 0.6 * sum(
        p.numel() * 4 for p in model.transformer.parameters()
    )  # fp16 by default

    with pytest.raises(ValueError, match=f"{REPO} is public; use another name, or make it private"):
        model.push_to_hub(REPO, private=True)
    model.push_to_hub("user/secret", private=True)
    assert hub.private == {"user/secret"}


def test_what_cannot_be_read_or_written_is_one_line(
    model: DallE, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files |= {"user/private": {}, "user/gated": {}}
    hub.private, hub.gated = {"user/private"}, {"user/gated"}
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN")
    start = "the folder does not exist, and"
    unseen = f"{start} Hugging Face has no model .* you can read; check the name, or log in with hf"
    for name, message in {
        "runs/transformer": unseen,
        "user/private": unseen,
        "user/gated": f"{start} access to user/gated has to be requested at {hub.url}/user/gated",
        "nowhere": "no model at nowhere: the folder does not exist$",
        "a/b/c": "no model at a/b/c: the folder does not exist$",
        "./runs/new": r"no model at ./runs/new: the folder does not exist$",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            DallE.from_pretrained(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"cannot upload to user/new: .*; log in with hf auth"):
        model.push_to_hub("user/new")
    with pytest.raises(ValueError, match=r"the repository is 'a/b/c', expected a name such as"):
        model.push_to_hub("a/b/c")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"not in Hugging Face's cache; unset HF_HUB_OFFLINE"):
        DallE.from_pretrained("user/other")
    with pytest.raises(ValueError, match=r"cannot upload to user/new: .* unset HF_HUB_OFFLINE"):
        model.push_to_hub("user/new")


def test_an_unreachable_hub_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: DallE
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    unread = r"not exist, and http://127\.0\.0\.1:9 cannot be reached; check the connection"
    with pytest.raises(ValueError, match=unread):
        DallE.from_pretrained("user/other")
    unwritten = r"to user/new: a request to http://127\.0\.0\.1:9 failed \(.*\); check the con"
    with pytest.raises(ValueError, match=unwritten):
        model.push_to_hub("user/new")


def test_every_file_of_a_model_is_downloaded() -> None:
    files = {f.relative_to(BUNDLED).as_posix() for f in BUNDLED.rglob("*") if f.is_file()}
    files |= {INFO_NAME, GENERATION_NAME, "text-0/config.json", "text-1/model.safetensors"}
    assert {f for f in files if not any(fnmatch(f, name) for name in MODEL_FILES)} <= {
        "README.md",
        "classifier.safetensors",
    }


def test_export_needs_a_destination(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        ([], "expected --out FOLDER, --push-to-hub user/name, or both"),
        (["--out", "x", "--private"], "--private needs --push-to-hub user/name"),
        (["--push-to-hub", "name"], "the repository is 'name', expected a name such as user/model"),
    ):
        with pytest.raises(SystemExit):
            export.main(["--model", "x", *flags])
        assert message in capsys.readouterr().err


def test_the_information_is_inherited_and_damage_is_reported(tmp_path: Path) -> None:
    assert ModelInfo.load(tmp_path) == ModelInfo()
    info = ModelInfo(license="cc-by-nc-sa-4.0", source="kakaobrain/minDALL-E", steps=3)
    info.save(tmp_path)
    assert ModelInfo.load(tmp_path) == info
    tuned = info.fine_tuned("toybox", 8)
    assert tuned == replace(info, data="toybox", steps=None, batch_size=8)
    (tmp_path / "checkpoint.json").write_text('{"step": 7}')
    tuned.save(tmp_path)
    assert ModelInfo.load(tmp_path).steps == 7
    for damage in ("{", "[1]", '{"steps": "many"}'):
        (tmp_path / "model_info.json").write_text(damage)
        with pytest.raises(ValueError, match=r"model_info.json is damaged .*; remove it"):
            ModelInfo.load(tmp_path)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("toybox", "toybox"),
        ("runs/my data/", "my data"),
        ("https://host/a/b.tar?token=secret", "b.tar"),
        ("pipe:aws --key secret s3 cp s3://a/b.tar -", "a stream of shards"),
        ("s3://bucket/shards/{0..9}.tar", "{0..9}.tar"),
        ("/data/{000..012}.tar::2,toybox::1", "{000..012}.tar (weight 2), toybox (weight 1)"),
        ("runs/{a,b}.tar,toybox", "{a,b}.tar, toybox"),
        ("pipe:curl -H 'Authorization: a,secret' -o- https://host/a.tar", "a stream of shards"),
        ("https://host/a.tar?key=a%2Csecret::2,toybox::1", "a.tar (weight 2), toybox (weight 1)"),
        ("https://host/a.tar#token=secret/b", "a.tar"),
        ("https://host/a.tar;session=secret/b", "a.tar"),
        ("https://user:password@host", "unnamed data"),
        ("https://user:password@host/a.tar", "a.tar"),
        ("s3://key@bucket/", "unnamed data"),
        ("user:password@host", "host"),
        (r"C:\Users\name\private\data", "data"),
        (r"\\server\share\data\\"[:-1], "data"),
    ],
)
def test_the_name_of_the_data_holds_no_path_or_secret(data: str, name: str) -> None:
    assert data_name(data) == name
