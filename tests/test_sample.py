"""The command that samples: what each flag does to the images, alone and in several processes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from launch import in_two_processes
from PIL import Image

from dalle1 import DallE
from dalle1.commands import doctor, sample
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.sampling.generation import GenerationConfig
from dalle1.text.bpe import Tokenizer
from dvae import DVAE, DVAEConfig

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red cube"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model of 4 × 4 codes that samples anything."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([PROMPT, "a blue star"], 262)
    size = {"width": 4, "blocks_per_group": 1, "code_width": 8}
    dvae = DVAE(DVAEConfig(image_size=32, codebook_size=16, **size)).eval()
    model = Transformer(
        TransformerConfig(
            text_vocab=tokenizer.vocab_size,
            text_len=16,
            codebook_size=16,
            grid_size=4,
            width=16,
            depth=2,
            heads=2,
        )
    )
    with torch.no_grad():
        dvae.decoder.input.weight.mul_(10)
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    path = tmp_path_factory.mktemp("model")
    DallE(dvae, model, tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (48, 32, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def arguments(folder: Path, out: Path, *args: str) -> list[str]:
    fixed = ["--model", str(folder), "--device", "cpu", "--precision", "fp32"]
    return [*fixed, "--num-candidates", "5", "--num-images", "5", "--out", str(out), *args]


def sampled(folder: Path, out: Path, *args: str) -> list[bytes]:
    """Run the command; return the pixels of its images."""
    sample.main(arguments(folder, out, *args))
    entries = json.loads((out / "scores.json").read_text())
    return [Image.open(out / entry["file"]).tobytes() for entry in entries]


def test_each_flag_changes_the_images(folder: Path, photo: Path, tmp_path: Path) -> None:
    plain = sampled(folder, tmp_path / "plain", PROMPT)
    assert len(set(plain)) == 5
    mask = Image.new("L", (32, 48))
    mask.paste(255, (0, 30, 32, 48))
    mask.save(tmp_path / "mask.png")
    flags = (
        *("--guidance 3", "--typical 0.4", "--temperature 0.3", "--seed 1", "--rerank likelihood"),
        *(f"--image {photo} --keep-rows 2", f"--image {photo} --mask {tmp_path / 'mask.png'}"),
    )
    results = [sampled(folder, tmp_path / "other", PROMPT, *flag.split()) for flag in flags]
    assert all(result != plain for result in results)
    assert sorted(results[4]) == sorted(plain)  # reranked, the same images in another order
    assert sampled(folder, tmp_path / "again", PROMPT, "--guidance", "1") == plain
    assert sampled(folder, tmp_path / "again", PROMPT, "--batch-size", "2") == plain
    settings = json.loads(Image.open(tmp_path / "other" / "00.png").text["settings"])
    assert settings["mask"] == str(tmp_path / "mask.png")


def test_the_models_defaults_hold_unless_a_flag_says_otherwise(
    folder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "model"
    shutil.copytree(folder, own)
    (own / "generation.json").write_text(
        '{"guidance": 3, "temperature": 0.3, "num_candidates": 3, "rerank": "likelihood"}'
    )
    at = ["--model", str(own), "--device", "cpu", "--precision", "fp32", PROMPT, "--out"]
    sample.main([*at, str(tmp_path / "default")])
    settings = json.loads(Image.open(tmp_path / "default" / "00.png").text["settings"])
    expected = {"guidance": 3, "temperature": 0.3, "rerank": "likelihood", "top_p": 1.0}
    assert {name: settings[name] for name in expected} == expected
    assert (settings["num_candidates"], settings["num_images"]) == (3, 3)
    flags = "--guidance 3 --temperature 0.3 --rerank likelihood --num-candidates 3 --num-images 3"
    images = [(tmp_path / "default" / f"0{i}.png") for i in range(3)]
    by_flags = sampled(folder, tmp_path / "flags", PROMPT, *flags.split())
    assert [Image.open(path).tobytes() for path in images] == by_flags
    plain = sampled(folder, tmp_path / "plain", PROMPT)
    assert sampled(own, tmp_path / "own", PROMPT, "--plain") == plain
    assert sampled(own, tmp_path / "own", PROMPT, "--plain", "--guidance", "3") != plain


def test_a_script_reads_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.main(arguments(folder, tmp_path, PROMPT, "a star", "--json"))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], second["prompt"]) == (PROMPT, "a star")
    files = [Path(image["file"]) for image in first["images"]]
    assert len(files) == 5
    assert all(path.is_file() for path in [*files, Path(second["grid"])])
    assert first["images"][0]["candidate"] == 0
    assert first["settings"]["guidance"] == 1


def test_doctor_samples_an_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--model", str(folder), "--device", "cpu"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("sampling     one image of 32 × 32 pixels in ")


def test_prompts_come_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\n  a blue star \n")
    out = tmp_path / "out"
    sample.main(arguments(folder, out, "a cube", "--prompts-file", str(tmp_path / "prompts.txt")))
    assert {p.name for p in out.iterdir()} == {"a-cube", "a-red-cube", "a-blue-star"}
    alone = sampled(folder, tmp_path / "alone", PROMPT)
    assert [(out / "a-red-cube" / f"0{i}.png").is_file() for i in range(5)] == [True] * 5
    assert Image.open(out / "a-red-cube" / "00.png").tobytes() == alone[0]


@pytest.mark.parametrize(
    ("words", "prompts", "counts"),
    [
        (["a cat", "--num-candidates", "1"], ["a cat"], (1, 1)),
        (["a cat", "--num-candidates", "3"], ["a cat"], (3, 3)),
        (["a cat", "--num-images", "20"], ["a cat"], (20, 20)),
        (["a cat", "--num-images", "1"], ["a cat"], (16, 1)),
        (["a cat"], ["a cat"], (16, 4)),
        (["a cat", "--seed", "1", "a dog"], ["a cat", "a dog"], (16, 4)),
        (["--seed", "1", "--", "--a cat"], ["--a cat"], (16, 4)),
        ([" a \udcff cat "], ["a \ufffd cat"], (16, 4)),
    ],
)
def test_words_are_read_as_people_write_them(
    words: list[str], prompts: list[str], counts: tuple[int, int]
) -> None:
    options = sample.parse(words)
    assert options.prompts == prompts
    sample.set_defaults(options, GenerationConfig())
    assert (options.num_candidates, options.num_images) == counts


def test_words_without_quotes_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.parse(["a", "red", "cube"]).prompts == ["a", "red", "cube"]
    assert capsys.readouterr().err.startswith("note: 3 prompts of one word; put quotes around")
    sample.parse(["a cat", "dog"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prompt", ["", " ", "\u200b", "\ufe0f"])
def test_a_prompt_that_shows_nothing_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        sample.parse(["a cat", prompt])


def test_flags_and_files_expand_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_bytes("a \ud83d cat\n".encode("utf-8", "surrogatepass"))
    options = sample.parse(["--prompts-file=~/prompts.txt", "--out=~/out", "--model", "~/model"])
    assert (options.out, options.model) == (tmp_path / "out", str(tmp_path / "model"))
    assert options.prompts == ["a \ufffd cat"]
    assert sample.parse(["~", "a cat,~"]).prompts == ["~", "a cat,~"]


def test_a_preview_shows_the_rows_as_they_come(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        if target.name != "preview.png":
            return replace(source, target)
        image = Image.open(source).convert("RGB")  # four tiles of 32 pixels, gaps of 4
        lines = [image.crop((4, 4 + y, 36, 5 + y)) for y in range(32)]
        shown.append(sum(line.getcolors() == [(32, (128, 128, 128))] for line in lines))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    sampled(folder, tmp_path, PROMPT, "--preview")
    assert shown == [24, 16, 8, 0]
    assert (tmp_path / "preview.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--keep-rows 2", "--image needs either --keep-rows or --mask"),
        ("--image PHOTO", "--image needs either --keep-rows or --mask"),
        ("--image PHOTO --keep-rows 2 --mask PHOTO", "--image needs either"),
        ("--image PHOTO --keep-rows 4", "--keep-rows is 4, expected 0 to 3"),
        ("--image nowhere.png --keep-rows 1", "--image is nowhere.png, expected an image; No such"),
        (
            "--image TEXT --keep-rows 1",
            "text, expected an image; it begins b'no image', as no image does",
        ),
        ("--image PHOTO --mask TEXT", "text, expected an image; it begins b'no image'"),
        ("--prompts-file nowhere.txt", "nowhere.txt"),
        ("--prompts-file BINARY", "is not UTF-8"),
        ("--guidance -1", "error: --guidance is -1"),
        ("--typical 0", "error: --typical is 0"),
        ("--top-k -1", "error: --top-k is -1"),
        ("--num-candidates 0", "--num-candidates is 0, expected at least 1"),
        ("--num-images 0", "--num-images is 0, expected 1 to --num-candidates, 5"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag; see dalle1 sample --help"),
        ("--rerank clip", "this model has no CLIP to rerank with"),
        ("--batch-size many", "argument --batch-size: invalid"),
    ],
)
def test_mistakes_are_reported_in_a_line(
    folder: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    message: str,
) -> None:
    (tmp_path / "text").write_text("no image")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    for word, path in (("PHOTO", photo), ("TEXT", tmp_path / "text")):
        flags = flags.replace(word, str(path))
    flags = flags.replace("BINARY", str(tmp_path / "binary"))
    with pytest.raises(SystemExit) as stopped:
        sample.main(arguments(folder, tmp_path / "out", PROMPT, *flags.split()))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_two_processes_sample_what_one_samples(folder: Path, tmp_path: Path) -> None:
    alone = sampled(folder, tmp_path / "alone", PROMPT, "--rerank", "likelihood")
    scores = (tmp_path / "alone" / "scores.json").read_text()
    together = tmp_path / "together"
    command = [
        str(ROOT / "sample.py"),
        *arguments(folder, together, PROMPT),
        "--rerank",
        "likelihood",
    ]
    in_two_processes(*command)
    entries = json.loads((together / "scores.json").read_text())
    assert [Image.open(together / entry["file"]).tobytes() for entry in entries] == alone
    for entry, expected in zip(entries, json.loads(scores), strict=True):
        assert entry["score"] == pytest.approx(expected["score"], abs=1e-4)
