"""Folders of samples: names, what is replaced in them, full disks, and runs at the same time."""

from __future__ import annotations

import errno
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dalle1 import Candidate, outputs
from dalle1.data.images import save_png
from dalle1.outputs import check_writable, preview_path, scored_files, slug, write

LONG = "a very long description of a scene with many many words that all come before the one "


def candidates(count: int = 2, seed: int = 0) -> list[Candidate]:
    return [
        Candidate(
            image=Image.new("RGB", (8, 8), (i, seed, 0)),
            codes=torch.zeros(1, 1),
            index=i,
            seed=seed,
            score=None,
        )
        for i in range(count)
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def prompt_in(folder: Path) -> str:
    with Image.open(folder / "00.png") as image:
        return image.text["prompt"]


def seed_in(folder: Path) -> tuple[int, int]:
    """Return the seed by the image, and by scores.json."""
    with Image.open(folder / "00.png") as image:
        by_image = image.getpixel((0, 0))[1]
    return by_image, json.loads((folder / "scores.json").read_text())[0]["seed"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red cube", "a-red-cube"),
        ("A Zebra, on the moon!", "a-zebra-on-the-moon"),
        ("x" * 80, "x" * 80),
        ("\u732b" * 80, "\u732b" * 80),
        ("ein blauer W\u00fcrfel", "ein-blauer-w\u00fcrfel"),
    ],
)
def test_names_of_folders_that_fit_stay_as_they_are(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_prompts_whose_names_are_cut_or_empty_get_their_own_folder() -> None:
    prompts = [
        LONG + "red cube",
        LONG + "blue star",
        "\U0001f98a",
        "\U0001f43c",
        "\ud83e",
        "!",
        "?",
    ]
    prompts += ["\U0001d4ea" * 70, "\U0001d4ea" * 71, "x" * 81, "x" * 82]
    found = [slug(prompt) for prompt in prompts]
    assert len(set(found)) == len(prompts)
    assert max(len(name.encode()) for name in found) <= 240
    assert max(map(len, found)) <= 80
    assert found[0].startswith("a-very-long-description-of-a-scene-with-")
    assert found[2].startswith("prompt-")


def test_another_prompt_of_the_same_name_is_not_replaced(tmp_path: Path) -> None:
    folder, how = tmp_path / "cube", {"is_named": False}
    for prompt in ("\U0001f98a cube", "\U0001f43c cube \ud83e"):
        write(folder, prompt, candidates(), {}, **how)
    assert [prompt_in(tmp_path / x) for x in ("cube", "cube-2")] == [
        "\U0001f98a cube",
        "\U0001f43c cube \\ud83e",
    ]
    for prompt, name in (("\U0001f43c cube \ud83e", "cube-2"), ("\U0001f98a cube", "cube")):
        assert write(folder, prompt, candidates(seed=1), {}, **how) == tmp_path / name
        assert seed_in(tmp_path / name) == (1, 1)
    taken: set[Path] = set()
    for name in ("cube", "cube-3"):  # the same prompt twice in one run
        target = write(folder, "\U0001f98a cube", candidates(), {}, **how, taken=taken)
        assert target == tmp_path / name
    assert names(tmp_path) == ["cube", "cube-2", "cube-3"]


def test_an_earlier_run_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "a cube", candidates(4), {})
    (tmp_path / "03.png").write_bytes(b"edited")
    (tmp_path / "notes.txt").write_text("mine")
    assert write(tmp_path, "a star", candidates(2, seed=1), {}) == tmp_path
    assert names(tmp_path) == ["00.png", "01.png", "03.png", "grid.png", "notes.txt", "scores.json"]
    assert seed_in(tmp_path) == (1, 1)
    assert prompt_in(tmp_path) == "a star"


@pytest.mark.parametrize("name", ["00.png", "grid.png", "scores.json"])
def test_files_of_the_user_are_not_replaced(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "v1.0"
    folder.mkdir()
    if name == "scores.json":
        (folder / name).write_text('{"prompt": "of dalle1 rank"}')
    else:
        Image.new("RGB", (8, 8)).save(folder / name)
    before = (folder / name).read_bytes()
    for seed in (0, 1):
        with pytest.warns(UserWarning, match=r"v1.0 holds files .*; the images are in .*v1.0-2"):
            assert write(folder, "a cube", candidates(seed=seed), {}) == tmp_path / "v1.0-2"
    assert names(folder) == [name]
    assert (folder / name).read_bytes() == before
    assert seed_in(tmp_path / "v1.0-2") == (1, 1)


def test_the_working_folder_may_be_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path(), "a cube", candidates(), {})
    (tmp_path / "here" / "00.png").write_bytes(b"mine")
    with pytest.warns(UserWarning, match="holds files"):
        assert write(Path(), "a cube", candidates(), {}) == tmp_path / "here-2"


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("files", [0, 1, 3])
def test_a_full_disk_leaves_the_earlier_run_whole(
    is_named: bool, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a-cube"
    write(folder, "a cube", candidates(), {}, is_named=is_named)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written, save = [], Image.Image.save

    def full(image: Image.Image, path: Any, *args: Any, **how: Any) -> None:
        if len(written) == files:
            Path(path).touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save(image, path, *args, **how)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"cannot write to .*a-cube \(No space left on device\)"):
        write(folder, "a cube", candidates(4, seed=1), {}, is_named=is_named)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == ["a-cube"]


def test_scores_are_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a cube", candidates(), {})
    replace, moved = os.replace, []

    def stopped(source: Path, target: Path) -> None:
        if target.parent == tmp_path:
            moved.append(target.name)
            if len(moved) == 2:
                raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(outputs.os, "replace", stopped)
    with pytest.raises(ValueError, match="Input/output error"):
        write(tmp_path, "a cube", candidates(seed=1), {})
    assert scored_files(tmp_path) is None  # none rather than those of other images
    monkeypatch.undo()
    assert write(tmp_path, "a cube", candidates(seed=1), {}) == tmp_path
    assert seed_in(tmp_path) == (1, 1)


def test_runs_at_the_same_time_lose_no_image(tmp_path: Path) -> None:
    prompts = [f"a cube{marks}" for marks in ("", "!", "?", ".", ":", ";", "!!", "??")]

    def run(prompt: str) -> Path:
        check_writable(tmp_path, [slug(prompt)])
        return write(tmp_path / slug(prompt), prompt, candidates(), {}, is_named=False)

    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            folders = dict(zip(prompts, pool.map(run, prompts), strict=True))
    assert len(set(folders.values())) == len(prompts)
    assert {prompt_in(folder) for folder in tmp_path.iterdir()} == set(prompts)
    assert all(scored_files(folder) == ["00.png", "01.png"] for folder in folders.values())


@pytest.mark.parametrize("is_named", [True, False])
def test_runs_of_one_prompt_do_not_mix_their_images(tmp_path: Path, is_named: bool) -> None:
    def run(seed: int) -> Path:
        return write(tmp_path / "x", "p", candidates(6, seed=seed), {}, is_named=is_named)

    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(run, range(4))) == {tmp_path / "x"}
        by_image = {Image.open(path).getpixel((0, 0))[1] for path in tmp_path.glob("x/0*.png")}
        assert by_image == {seed_in(tmp_path / "x")[1]}
        assert names(tmp_path) == ["x"]
        assert names(tmp_path / "x")[-1] == "scores.json"


def test_what_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*file .*; use another --out"):
        check_writable(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to"):
        check_writable(tmp_path / "new", ["x" * 300])
    assert not (tmp_path / "new").exists()
    check_writable(tmp_path / "new", [slug("\U0001d4ea" * 70)])


def test_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    target = write(tmp_path / "a-cube", "a cube", candidates(), {}, is_named=False)
    usual = (tmp_path / "usual").stat()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(usual.st_mode)


def test_a_preview_replaces_no_file_of_the_user(tmp_path: Path) -> None:
    assert preview_path(tmp_path) == tmp_path / "preview.png"
    save_png(Image.new("RGB", (8, 8)), tmp_path / "preview.png", {"settings": "preview"})
    assert preview_path(tmp_path) == tmp_path / "preview.png"
    Image.new("RGB", (8, 8)).save(tmp_path / "preview.png")
    assert preview_path(tmp_path) == tmp_path / "preview-2.png"
