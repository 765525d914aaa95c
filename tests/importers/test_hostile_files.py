"""Small files that would take a lot of memory are refused before they do."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import dalle_pytorch_file

from dalle1.importers import checkpoint, dalle_pytorch, vqgan
from dalle1.importers.checkpoint import unpickle
from dalle1.importers.clip_bpe import read_clip_bpe
from dalle1.importers.state_dict import build_transformer
from dalle1.importers.yttm import read_yttm
from dalle1.model.transformer import TransformerConfig
from dalle1.vqgan import VQGAN, VQGANConfig
from dalle1.vqgan.strided_dvae import StridedDVAE, StridedDVAEConfig


def test_tokens_that_double_are_refused(tmp_path: Path) -> None:
    count = 12  # 36 would take 100 GB
    merges = [f"{4 + i} {4 + i} {5 + i}" for i in range(count)]
    path = tmp_path / "bpe.model"
    path.write_text("\n".join([f"1 {count}", "97 4", *merges, "1 0 2 3"]) + "\n")
    with pytest.raises(ValueError, match="token 14 is longer than 1000 characters"):
        read_yttm(path)


@pytest.mark.parametrize("read", [read_clip_bpe, read_yttm])
def test_text_is_read_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_TEXT", 1 << 20)
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(b"a b\n" * (1 << 19)))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(ValueError, match="more than 1 MiB of text"):
        read(path)
    path.write_bytes(gzip.compress(b"a b\n" * 99)[:-9])
    with pytest.raises(ValueError, match=r"a damaged \.gz"):
        read(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 10, 1 << 10),
        torch.zeros(9).as_strided((9, 9), (0, 1)),
        torch.empty(3, device="meta"),
        torch.eye(2).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    ],
)
def test_tensors_without_stored_numbers_are_refused(tmp_path: Path, tensor: Any) -> None:
    content: list[Any] = [{"a": ({"b": tensor},)}]
    content.append(content)  # lists may hold themselves
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"has a tensor \(.*\) without as many stored numbers"):
        unpickle(tmp_path / "a.ckpt")


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a tensor of torch\.complex64, expected real numbers"):
        unpickle(tmp_path / "a.ckpt")


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path, small = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    torch.save({"a": torch.zeros(1 << 16)}, path)
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match="is compressed inside"):
        unpickle(small)
    assert unpickle(path)["a"].shape == (1 << 16,)


def test_a_depth_without_tensors_is_refused(tmp_path: Path) -> None:
    path, _ = dalle_pytorch_file(tmp_path)
    content = torch.load(path, weights_only=True)
    content["hparams"]["depth"] = 10**5  # 10 ** 9 would take 80 GB
    torch.save(content, path)
    params, tensors, _ = dalle_pytorch.read_checkpoint(path)
    with pytest.raises(ValueError, match="hyperparameter depth 100000, expected at least 1 and at"):
        dalle_pytorch.load_transformer(tensors, params)


def test_shapes_that_do_not_fit_take_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VQGANConfig(image_size=8, width=32, multipliers=(1, 2), blocks=1, attention=())
    state = VQGAN(config).state_dict()
    state["encoder.down.1.block.0.conv1.weight"] = torch.zeros(1 << 12, 1, 1, 1)
    torch.save(state, tmp_path / "a.ckpt")
    made: list[str] = []
    init = torch.nn.Conv2d.reset_parameters

    def reset(self: torch.nn.Conv2d) -> None:
        made.append(self.weight.device.type)
        init(self)

    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", reset)
    with pytest.raises(ValueError, match="does not match a VQGAN"):
        vqgan.load_vqgan(tmp_path / "a.ckpt")
    assert set(made) == {"meta"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("blocks", 10**5), ("layers", 5000), ("blocks", 10**4)],
)
def test_sizes_that_no_file_holds_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    if name == "layers" or value == 10**4:
        model: Any = StridedDVAE(StridedDVAEConfig(image_size=8, width=8, code_width=8))
    else:
        sizes = {"latent_width": 8, "code_width": 8, "codebook_size": 16}
        model = VQGAN(
            VQGANConfig(image_size=8, width=32, multipliers=(1, 2), attention=(), **sizes)
        )
    path = model.save(tmp_path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    config = json.loads(header["__metadata__"]["config"]) | {name: value}
    header["__metadata__"]["config"] = json.dumps(config | ({"image_size": 1 << 12}))
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])
    with pytest.raises(ValueError, match=re.escape(f"{name} is ")):
        type(model).load(tmp_path)


def test_a_size_beyond_all_floats_is_one_error() -> None:
    sizes = {"text_vocab": 8, "text_len": 4, "codebook_size": 8, "grid_size": 2, "depth": 1}
    config = TransformerConfig(**sizes, heads=1, width=2 * 10**400)
    with pytest.raises(ValueError, match=r"a\.pt does not match the expected transformer"):
        build_transformer(config, {}, "a.pt")
