"""Codes: written once, read back, never mixed up."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import Member, write_tar

from dalle1.data import codes
from dalle1.data.codes import CodeSource, fingerprint, open_codes
from dalle1.data.crops import FOR_TRANSFORMER, augmented, random_crop
from dalle1.data.encoded import EncodeConfig, encode, encoding_precision, main
from dalle1.data.examples import iter_batches
from dalle1.data.images import to_float, to_tensor
from dalle1.devices import autocast
from dalle1.image_tokenizer import load_image_tokenizer
from dalle1.toybox import Toybox
from dalle1.vqgan import VQGAN, VQGANConfig
from dvae import DVAE, DVAEConfig

RNG = random.Random(0)
CPU = torch.device("cpu")


# Codes


def save_dvae(folder: Path, seed: int = 0) -> DVAE:
    torch.manual_seed(seed)
    model = DVAE(DVAEConfig(image_size=32, width=8, codebook_size=50, code_width=8))
    model.save(folder)
    return DVAE.load(folder)


def encoding(folder: Path, **changes: Any) -> EncodeConfig:
    plain: dict[str, Any] = {
        "dvae": folder / "dvae",
        "out": folder / "codes",
        "data": "toybox:10",
        "captions": 3,
        "batch_size": 3,
        "shard_size": 4,
        "device": "cpu",
        "num_workers": 0,
    }
    return EncodeConfig(**{**plain, **changes})


@pytest.fixture
def encoded(tmp_path: Path) -> tuple[EncodeConfig, DVAE]:
    model, config = save_dvae(tmp_path / "dvae"), encoding(tmp_path)
    encode(config)
    return config, model


def test_codes_are_read_back(encoded: tuple[EncodeConfig, DVAE]) -> None:
    config, model = encoded
    assert [f.name for f in sorted(config.out.glob("*.tar"))] == [f"0000{i}.tar" for i in range(3)]
    source = open_codes(str(config.out), "train", config.dvae, model)
    assert source is not None
    assert (len(source), source.codes(0, RNG).shape) == (10, (4, 4))
    toybox = Toybox(size=32, num_scenes=10)
    for begin, end in ((0, 3), (3, 4), (4, 7), (7, 8), (8, 10)):  # as batches and shards fall
        images = torch.stack([to_tensor(toybox.image(i)) for i in range(begin, end)])
        with autocast(CPU, encoding_precision(CPU)):
            expected = model.encode(to_float(images))
        assert torch.equal(torch.stack([source.codes(i, RNG) for i in range(begin, end)]), expected)
    assert source.codes(0, RNG).dtype == torch.int64
    assert len(torch.stack([source.codes(i, RNG) for i in range(10)]).unique()) > 2
    captions = {source.caption(6, random.Random(i)) for i in range(40)}
    assert captions == {toybox.caption(6, random.Random(f"0/6/{i}")) for i in range(3)}
    assert len(captions) > 1


def test_encoding_resumes_where_it_stopped(
    encoded: tuple[EncodeConfig, DVAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = encoded
    before = [source_of(config).codes(i, RNG) for i in range(10)]
    times = {f.name: f.stat().st_mtime_ns for f in config.out.glob("*.tar")}
    (config.out / "00001.tar").unlink()
    (config.out / "00001.partial").write_text("a shard that was never finished")
    read: list[int] = []
    image = Toybox.image
    monkeypatch.setattr(Toybox, "image", lambda self, i: read.append(i) or image(self, i))
    encode(config)
    assert read == [4, 5, 6, 7]
    after = {f.name: f.stat().st_mtime_ns for f in config.out.glob("*.tar")}
    assert {name for name in after if times[name] != after[name]} == {"00001.tar"}
    assert not list(config.out.glob("*.partial"))
    again = [source_of(config).codes(i, RNG) for i in range(10)]
    assert all(torch.equal(a, b) for a, b in zip(before, again))


def test_codes_take_little_memory_and_no_second_reading(
    encoded: tuple[EncodeConfig, DVAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = encoded
    scanned: list[Path] = []
    scan = codes.index_files

    def watched(shards: list[Path], suffixes: Any) -> np.ndarray:
        scanned.extend(shards)
        return scan(shards, suffixes)

    monkeypatch.setattr(codes, "index_files", watched)
    source = source_of(config)
    assert isinstance(source.entries, np.memmap)
    assert source.entries.nbytes == 40 * 10
    assert not scanned
    before = [(source.captions(i), source.crops(i).tolist()) for i in range(10)]
    # Shards that changed, or that were encoded before there was such a file, are looked through.
    with (config.out / "00001.tar").open("ab") as file:
        file.write(bytes(10240))
    for _ in range(2):
        source = source_of(config)
        assert len(scanned) == 3
        assert [(source.captions(i), source.crops(i).tolist()) for i in range(10)] == before
        (config.out / "entries.npy").unlink(missing_ok=True)
        scanned.clear()
    encode(config)
    scanned.clear()
    assert len(source_of(config)) == 10
    assert not scanned


def source_of(config: EncodeConfig) -> CodeSource:
    return CodeSource(config.out)


def test_codes_of_another_dvae_or_other_data_are_refused(
    encoded: tuple[EncodeConfig, DVAE], tmp_path: Path
) -> None:
    config, model = encoded
    save_dvae(tmp_path / "other", seed=1)
    assert fingerprint(tmp_path / "other") != fingerprint(config.dvae)
    with pytest.raises(ValueError, match=r"of another dVAE than .*other; encode the data again"):
        open_codes(str(config.out), "train", tmp_path / "other", model)
    for change in ({"dvae": tmp_path / "other"}, {"data": "toybox:11"}, {"seed": 1}):
        with pytest.raises(ValueError, match="holds codes of another dVAE or other data"):
            encode(encoding(tmp_path, **change))
    assert len(source_of(config)) == 10


@pytest.mark.parametrize("how", ["indexed", "streaming"])
def test_nothing_is_lost_between_shards_and_codes(tmp_path: Path, how: str) -> None:
    save_dvae(tmp_path / "dvae")
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    keys = ["a.b.1", "a.b.2", "0", "0", "1", "lone", "0"]  # keys come again, and have dots
    members: list[Member] = [("._0.png", b""), ("0.txt", "elsewhere")]
    for i, key in enumerate(keys):
        members += [(f"{key}.png", buffer.getvalue()), (f"{key}.txt", f"number {i}".encode())]
        members = members[:-1] if key == "lone" else members
    shard = write_tar(tmp_path / "a.tar", members)
    data = {"indexed": str(shard), "streaming": f"file:{shard}"}[how]
    encode(config := encoding(tmp_path, data=data, max_bad_fraction=1.0))
    source = source_of(config)
    captions = [caption for i in range(len(source)) for caption in source.captions(i)]
    assert captions == [f"number {i}" for i in (0, 1, 2, 3, 4, 6)]
    lines = (config.out / "skipped.jsonl").read_text().splitlines()
    causes = sorted(json.loads(line)["cause"] for line in lines)
    assert causes == ["hidden file", "no caption", "no image"]


def run(config: EncodeConfig) -> int:
    """Return the exit code of `dalle1 encode`."""
    flags = {"--data": config.data, "--dvae": config.dvae, "--out": config.out}
    words = [str(word) for flag in flags.items() for word in flag]
    try:
        main([*words, "--device", "cpu", "--num-workers", "0"])
    except SystemExit as stop:
        return stop.code
    return 0


def test_streams_that_were_cut_short_are_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dvae(tmp_path / "dvae")
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    shard, second = tmp_path / "0.tar", tmp_path / "1.tar"
    for path in (shard, second):
        files = [(f"{i}{end}", buffer.getvalue()) for i in range(3) for end in (".png", ".txt")]
        write_tar(path, [(name, b"a star" if ".txt" in name else data) for name, data in files])
    whole = shard.read_bytes()
    config = encoding(tmp_path, data=f"pipe:cat {tmp_path}/{{0..1}}.tar")
    kept = []
    for size in (2000, 0, 4500, len(whole)):
        shard.write_bytes(whole[:size])
        assert run(config) == (size < len(whole))
        kept.append(len(source_of(config)) - 3)
    assert kept == [1, 1, 2, 3]
    assert "1 of 2 shards were not read to their end" in capsys.readouterr().out
    times = [path.stat().st_mtime_ns for path in sorted(config.out.glob("*.tar"))]
    assert run(config) == 0
    assert times == [path.stat().st_mtime_ns for path in sorted(config.out.glob("*.tar"))]
    assert not list(config.out.glob("*.incomplete"))


def test_nothing_encoded_is_an_error_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dvae(tmp_path / "dvae")
    Image.new("RGB", (8, 8)).save(tmp_path / "dvae/small.png")
    (tmp_path / "dvae/small.txt").write_text("a star")
    for i, data in enumerate(("pipe:false", str(tmp_path / "dvae"))):
        config = encoding(tmp_path, data=data, out=tmp_path / f"codes{i}")
        for _ in range(2):
            assert run(config) == 2
            assert "all images were skipped" in capsys.readouterr().err


def test_codes_with_files_of_a_system_or_without_some(encoded: tuple[EncodeConfig, DVAE]) -> None:
    config, _ = encoded
    (config.out / "._00000.tar").write_bytes(b"of macOS")
    assert len(source_of(config)) == 10
    write_tar(config.out / "00001.tar", [("000000004.npy", b""), ("._000000004.npy", b"")])
    with pytest.raises(ValueError, match=r"4 in .*\.tar has \.npy, expected \.npy and \.json; "):
        source_of(config)
    (config.out / "codes.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no codes"):
        source_of(config)


def test_images_are_encoded_at_another_size(tmp_path: Path) -> None:
    model = save_dvae(tmp_path / "dvae")
    encode(config := encoding(tmp_path, image_size=16))
    source = open_codes(
        str(config.out), "train", config.dvae, DVAE.load(config.dvae, image_size=16)
    )
    assert source is not None
    image = to_float(to_tensor(Toybox(size=16, num_scenes=10).image(3))[None])
    with autocast(CPU, encoding_precision(CPU)):
        assert torch.equal(source.codes(3, RNG), model.encode(image)[0])
    with pytest.raises(ValueError, match=r"grids of 2, expected 4; use --image-size 16, or"):
        open_codes(str(config.out), "train", config.dvae, model)


def test_the_bundled_dvae_encodes(tmp_path: Path) -> None:
    bundled = Path("bundled")
    encode(config := encoding(tmp_path, dvae=bundled, image_size=16))
    dvae = load_image_tokenizer(bundled, image_size=16)
    source = open_codes(str(config.out), "train", bundled, dvae)
    assert source is not None
    assert source.codes(0, RNG).shape == (2, 2)


def test_sampled_codes(encoded: tuple[EncodeConfig, DVAE], tmp_path: Path) -> None:
    likely = source_of(encoded[0])
    config = replace(encoded[0], sample_codes=True)
    with pytest.raises(ValueError, match=r"settings \(sample_codes differ\)"):
        encode(config)
    for name in ("one", "two"):
        encode(replace(config, out=tmp_path / name))
    (tmp_path / "two" / "00001.tar").unlink()
    encode(replace(config, out=tmp_path / "two"))  # resumes there
    one, two = (source_of(replace(config, out=tmp_path / name)) for name in ("one", "two"))
    grids = [(s.codes(i, RNG), likely.codes(i, RNG)) for s in (one, two) for i in range(len(one))]
    for i, (sampled, _) in enumerate(grids[: len(one)]):
        assert torch.equal(sampled, grids[len(one) + i][0])  # the seed decides, resumed or not
    encode(replace(config, seed=1, out=tmp_path / "other"))
    other = source_of(replace(config, out=tmp_path / "other"))
    assert not torch.equal(other.codes(0, RNG), one.codes(0, RNG))
    assert len({source.digest() for source in (likely, one, other)}) == 3
    changed = torch.stack([sampled != best for sampled, best in grids]).float().mean()
    assert 0.3 < changed < 1  # of 50 codes, nearly uniform before training


def test_codes_are_sampled_from_a_dvae_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"image_size": 32, "width": 32, "multipliers": (1, 2), "blocks": 1, "attention": ()}
    codes = {"codebook_size": 16, "latent_width": 8, "code_width": 8}
    VQGAN(VQGANConfig(**sizes, **codes)).save(tmp_path / "vqgan")  # type: ignore[arg-type]
    words = ["--dvae", str(tmp_path / "vqgan"), "--data", "toybox:2", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--sample-codes", "--out", str(tmp_path / "codes")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--sample-codes needs a dVAE, as `dalle1 train dvae` writes it; the" in message
    assert "vqgan is a VQGAN" in message


def test_what_cannot_be_encoded_or_read_is_refused(tmp_path: Path) -> None:
    model = save_dvae(tmp_path / "dvae")
    with pytest.raises(ValueError, match="'toybox' is endless; add a number"):
        encode(encoding(tmp_path, data="toybox"))
    assert open_codes(str(tmp_path / "codes"), "train", tmp_path / "dvae", model) is None
    with pytest.raises(ValueError, match="holds no codes"):
        CodeSource(tmp_path / "codes")
    (tmp_path / "codes").mkdir(exist_ok=True)
    (tmp_path / "codes" / "codes.json").write_text(
        json.dumps({"dvae": "x", "grid_size": 4, "pictures": 9, "shard_size": 4})
    )
    with pytest.raises(ValueError, match="0 of 3 shards: its encoding was stopped"):
        CodeSource(tmp_path / "codes")


def test_several_crops_of_each_image(tmp_path: Path) -> None:
    model = save_dvae(tmp_path / "dvae")
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (3, 48, 40, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"image {i}")
    config = encoding(tmp_path, data=str(tmp_path / "images"), crops=3, batch_size=2)
    encode(config)
    source, how = source_of(config), (FOR_TRANSFORMER, False)
    assert len(source) == 3
    for i in range(3):
        rng = random.Random(f"0/{i}/crops")
        cut = [augmented(Image.fromarray(noise[i]), 32, rng, *how) for _ in range(3)]
        with autocast(CPU, encoding_precision(CPU)):
            expected = model.encode(to_float(torch.stack([to_tensor(c) for c in cut])))
        seen = {source.codes(i, random.Random(n)).numpy().tobytes() for n in range(40)}
        assert seen == {grid.numpy().tobytes() for grid in expected}
        assert len(seen) > 1
    with tarfile.open(config.out / "00000.tar") as tar:
        sizes = json.load(tar.extractfile("000000000.json"))["sizes"]  # type: ignore[arg-type]
    rng = random.Random("0/0/crops")
    crops = [random_crop(Image.fromarray(noise[0]), 32, rng, *how) for _ in range(3)]
    assert sizes == [[48, 40, crop.top, crop.left, 32, 32] for crop in crops]
    assert len({crop.top for crop in crops}) > 1


def test_small_images_are_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dvae(tmp_path / "dvae")
    (tmp_path / "images").mkdir()
    for name, side in (("a", 32), ("b", 31), ("c", 40), ("d", 25)):
        Image.new("RGB", (side, 50), "red").save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(name)
    config = encoding(tmp_path, data=str(tmp_path / "images"))
    encode(config)
    assert "Skipped 2 × too small" in capsys.readouterr().out
    assert [source_of(config).caption(i, RNG) for i in range(2)] == ["a", "c"]
    assert len(source_of(config)) == 2
    enlarged = encoding(tmp_path, data=config.data, allow_upscale=True, out=tmp_path / "all")
    encode(enlarged)
    assert len(source_of(enlarged)) == 4


def test_workers_that_are_spawned_can_encode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where processes are not forked, what prepares an image is pickled on its way to them.
    shapes = []

    def watched(source: Any, keys: Any, prepare: Any, *rest: Any) -> Any:
        sample = source.find(0)
        shapes.append(pickle.loads(pickle.dumps(prepare))(sample, RNG)["images"].shape)
        return iter_batches(source, keys, prepare, *rest)

    save_dvae(tmp_path / "dvae")
    monkeypatch.setattr("dalle1.data.encoded.iter_batches", watched)
    encode(encoding(tmp_path, data="toybox:1"))
    assert shapes == [(1, 3, 32, 32)]
