"""recipes/emoji on a few packages made up here; where it needs SVGs, with the rasteriser."""

from __future__ import annotations

import hashlib
import json
import random
import runpy
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle1.data import ReadOptions, open_source

ROOT = Path(__file__).resolve().parents[2]
RECIPE: dict[str, Any] = runpy.run_path(str(ROOT / "recipes" / "emoji" / "emoji.py"))
CONCEPTS = {f"1f4{i:02x}": f"animal {i}" for i in range(40)}
SVG = '<rect width="32" height="32" fill="#{colour}"/>'


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def colour(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()[:6]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of packages that have the layout of the real ones."""
    folder = tmp_path_factory.mktemp("packages")
    names = [
        {"hexcode": code.upper(), "label": name, "group": 3, "tags": ["animal", f"beast {code}"]}
        for code, name in CONCEPTS.items()
    ]
    flag = {"hexcode": "1F3C1", "label": "chequered flag", "group": 9, "tags": []}
    write(folder / "emojibase-data" / "en" / "data.json", [*names, flag])
    for package in ["emojibase-data", *(artist.package for artist in RECIPE["ARTISTS"].values())]:
        write(folder / package / "package.json", {"version": "1.0.0"})
    write(folder / "openmoji" / "LICENSE.txt", "share alike")
    assets = folder / "@lobehub" / "fluent-emoji-3d" / "assets"
    assets.mkdir()
    for code in (*CONCEPTS, "1f3c1"):
        Image.new("RGBA", (32, 32), f"#{colour(code)}").save(assets / f"{code}.webp")
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{SVG}</svg>'
        svg = svg.format(colour=colour(code))
        write(folder / "openmoji" / "color" / "svg" / f"{code.upper()}-FE0F.svg", svg)
    for name in ("fluent-emoji-flat", "twemoji", "noto"):
        icons = {f"i{code}": {"body": SVG.format(colour=colour(code))} for code in CONCEPTS}
        set_of = folder / "@iconify-json" / name
        write(set_of / "icons.json", {"icons": icons, "width": 32, "height": 32})
        write(set_of / "chars.json", {code: f"i{code}" for code in CONCEPTS})
    return folder


def run(packages: Path, out: Path, *args: str) -> None:
    RECIPE["main"](["--packages", str(packages), "--out", str(out), *args])


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def facts_in(shards: Sequence[Path]) -> list[dict[str, Any]]:
    found = []
    for shard in sorted(shards):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found.append(json.loads(tar.extractfile(member).read()))  # type: ignore[union-attr]
    return found


def test_one_artist_needs_no_rasteriser(packages: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run(packages, tmp_path / name, "--artists", "fluent 3d", "--shard-size", "16")
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    out = tmp_path / "first"
    assert [path.name for path in sorted((out / "train").iterdir())] == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]
    assert not (out / "heldout").exists()  # nobody else designed these concepts
    facts = facts_in(list((out / "train").iterdir()))
    assert sorted(pair["concept"] for pair in facts) == sorted(CONCEPTS.values())
    assert "Microsoft" in (out / "ATTRIBUTIONS.md").read_text()
    source, code = open_source(str(out / "train"), "encode", ReadOptions()), facts[0]["code"]
    image = source.image(0)
    assert image.size == (256, 256)
    assert image.getpixel((2, 2)) == (255, 255, 255)
    expected = Image.new("RGB", (1, 1), f"#{colour(code)}").getpixel((0, 0))
    assert all(abs(a - b) <= 4 for a, b in zip(image.getpixel((128, 128)), expected, strict=True))
    name, rng = facts[0]["concept"], random.Random(0)
    assert {source.caption(0, rng) for _ in range(20)} == {
        f"{name}, fluent 3d style",
        f"{name}, beast {code}, animal, fluent 3d style",
        f"beast {code}, animal, fluent 3d style",
    }


def test_held_out_pairs_occur_with_other_artists(packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="resvg_py, the recipe's rasteriser, is not installed")
    run(packages, tmp_path / "out", "--shard-size", "50")
    train = facts_in(list((tmp_path / "out" / "train").iterdir()))
    heldout = facts_in(list((tmp_path / "out" / "heldout").iterdir()))
    validation = [pair for pair in train if pair["held_out"]]
    trained_on = [pair for pair in train if not pair["held_out"]]
    assert len(trained_on) + len(heldout) == 5 * len(CONCEPTS)
    assert 10 <= len(heldout) <= 30  # half of 40 concepts lack one artist
    assert all(pair["held_out"] for pair in heldout)
    seen = {(pair["concept"], pair["artist"]) for pair in trained_on}
    for pair in heldout:
        assert (pair["concept"], pair["artist"]) not in seen
        assert sum(concept == pair["concept"] for concept, _ in seen) == 4
    # dalle1 validates on held-out pairs, and trains on all others.
    split = [
        len(open_source(str(tmp_path / "out" / "train"), name, ReadOptions()))  # type: ignore[arg-type]
        for name in ("train", "validation")
    ]
    assert split == [len(trained_on), len(validation)]
    assert train[-len(validation) :] == validation
    licence = tmp_path / "out" / "licences" / "openmoji" / "LICENSE.txt"
    assert licence.read_text() == "share alike"


def test_an_image_that_an_artist_used_before_is_skipped(packages: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packages, tmp_path / "packages")
    assets = copy / "@lobehub" / "fluent-emoji-3d" / "assets"
    shutil.copyfile(assets / "1f400.webp", assets / "1f401.webp")
    run(copy, tmp_path / "out", "--artists", "fluent 3d")
    concepts = {pair["concept"] for pair in facts_in(list((tmp_path / "out" / "train").iterdir()))}
    assert concepts == set(CONCEPTS.values()) - {"animal 1"}


def test_plain_errors(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "package.json does not exist; run recipes/emoji/emoji.sh": (tmp_path / "none", "out", ()),
        "holds files already; remove it": (packages, ".", ()),
        "--shard-size is 0, expected 1 to 10,000": (packages, "out", ("--shard-size", "0")),
    }
    (tmp_path / "file").touch()
    for message, (folder, out, flags) in cases.items():
        with pytest.raises(SystemExit) as caught:
            run(folder, tmp_path / out, "--artists", "fluent 3d", *flags)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
