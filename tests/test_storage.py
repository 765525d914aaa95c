"""Model files: what is saved is loaded, in little memory, by several threads at once."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.storage import (
    BUNDLED,
    atomic_path,
    claim,
    model_folder,
    same_tensors,
    save_weights,
    write_atomic,
)
from dalle1.tensor_files import quick_digest, read_tensors, write_tensors
from dvae import DVAE, DVAEConfig

ROOT = Path(__file__).resolve().parent.parent
ROTARY = TransformerConfig(
    text_vocab=50,
    text_len=6,
    codebook_size=32,
    grid_size=4,
    width=32,
    depth=4,
    heads=2,
    positions="rotary",
    rotary_grid=2,
)


def tiny_models() -> tuple[Transformer, DVAE]:
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=16, width=8, codebook_size=20, code_width=12))
    return Transformer(ROTARY).eval(), dvae.eval()


def test_loaded_buffers_are_those_of_a_new_model(tmp_path: Path) -> None:
    for positions in ("rotary", "learned"):
        config = replace(ROTARY, positions=positions, rotary_grid=None)
        model = Transformer(config).eval()
        model.save(tmp_path)
        loaded = Transformer.load(tmp_path)
        buffers = dict(loaded.named_buffers())
        assert {"masks.row.dense", "masks.conv.block_mask"} <= buffers.keys()
        for name, buffer in model.named_buffers():
            assert buffers[name].device.type == "cpu"
            assert torch.equal(buffers[name], buffer), name
        text, codes = torch.zeros(2, 6, dtype=torch.long), torch.arange(32).view(2, 16)
        expected, found = model.loss(text, codes), loaded.loss(text, codes)
        assert torch.equal(found.total, expected.total)


def test_two_threads_load_at_once_and_leave_torch_as_it_was(tmp_path: Path) -> None:
    transformer, dvae = tiny_models()
    transformer.save(tmp_path)
    dvae.save(tmp_path)
    register = nn.Module.register_parameter

    def load(index: int) -> nn.Module:
        return Transformer.load(tmp_path) if index % 2 else DVAE.load(tmp_path)

    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(load, range(40)))
    for index, model in enumerate(models):
        expected = (transformer if index % 2 else dvae).state_dict()
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert nn.Module.register_parameter is register
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_dvae_is_loaded_in_the_memory_format_it_computes_in(tmp_path: Path) -> None:
    _, dvae = tiny_models()
    dvae.save(tmp_path)
    weights = [p for p in DVAE.load(tmp_path).parameters() if p.ndim == 4]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_tensors_are_rounded_and_integers_are_not(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4), "c": torch.tensor([True, False])}
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "all", shapes, tensors.values())
    assert all(torch.equal(v, tensors[k]) for k, v in load_file(tmp_path / "all").items())
    rounded = dict(read_tensors(tmp_path / "all", torch.float16))
    assert torch.equal(rounded["a"], tensors["a"].half())
    assert rounded["b"].dtype == torch.int64
    write_tensors(tmp_path / "half", {"a": (torch.float16, (5, 3))}, [tensors["a"]])
    write_tensors(tmp_path / "a", {"a": (torch.float32, (5, 3))}, [tensors["a"]])
    assert same_tensors(tmp_path / "half", tmp_path / "a")
    assert not same_tensors(tmp_path / "all", tmp_path / "a")
    with pytest.raises(ValueError, match=r"a is \(5, 3\), expected \(3, 5\)"):
        write_tensors(tmp_path / "b", {"a": (torch.float32, (3, 5))}, [tensors["a"]])


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, "old")

    def interrupted() -> None:
        with atomic_path(path) as partial:
            partial.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    claim(path, {"seed": 1, "sizes": (2, 3)})
    claim(path, {"seed": 1, "sizes": (2, 3)})
    with pytest.raises(ValueError, match=r"other settings \(seed, new differ\); use another --out"):
        claim(path, {"seed": 2, "sizes": (2, 3), "new": None or 0})
    assert json.loads(path.read_text())["seed"] == 1


def test_the_kind_and_the_config_are_in_the_metadata(tmp_path: Path) -> None:
    _, dvae = tiny_models()
    with safe_open(dvae.save(tmp_path), "pt") as file:
        assert file.metadata()["kind"] == "dvae"
        assert json.loads(file.metadata()["config"])["width"] == 8
    with safe_open(save_weights(dvae, tmp_path / "other"), "pt") as file:
        assert file.metadata().keys() == {"config"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("what", "stored", "most"), [("loading", "fp16", 1.1), ("sampling", "fp32", 1.25)]
)
def test_loading_and_packing_take_little_more_than_the_weights(
    what: str, stored: str, most: float
) -> None:
    command = [sys.executable, "benchmarks/memory.py", what, "--preset", "small"]
    run = subprocess.run(
        [*command, "--stored", stored, "--grid-size", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # A second copy of the weights in the order of oneDNN would make it 1.9.
    assert float(run.stdout.split()[-1]) < most, run.stdout


def test_a_large_model_is_split_as_on_hugging_face(tmp_path: Path) -> None:
    model, _ = tiny_models()
    whole = model.save(tmp_path)
    digest = quick_digest(whole)
    save_weights(model, whole, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "transformer.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names[0] == f"transformer-00001-of-{len(names):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in model.state_dict().values()
    )
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert not whole.exists()  # it would hold another model than the shards
    assert quick_digest(whole) != digest
    loaded = Transformer.load(tmp_path)
    assert Transformer.config_of(tmp_path) == model.config
    assert all(torch.equal(t, loaded.state_dict()[k]) for k, t in model.state_dict().items())

    save_weights(model, whole, max_shard_bytes=10_000)  # more and other shards
    assert names[0] not in {path.name for path in tmp_path.iterdir()}
    shard = next(tmp_path.glob("transformer-*-of-*"))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=f"index.json lists {shard.name}, which .* not hold; copy"):
        Transformer.load(tmp_path)
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is damaged, or holds no Transformer"):
        Transformer.load(tmp_path)
    (tmp_path / "transformer.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index.json is damaged, expected the index"):
        Transformer.config_of(tmp_path)

    model.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer.safetensors"]


def test_bundled_is_the_model_that_ships_and_never_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder("bundled") == model_folder(Path("bundled")) == BUNDLED
    (tmp_path / "bundled" / "step-5").mkdir(parents=True)
    with pytest.warns(UserWarning, match="bundled is the model that ships.*write .*bundled"):
        assert model_folder("bundled") == BUNDLED
    assert model_folder(tmp_path / "bundled") != BUNDLED
