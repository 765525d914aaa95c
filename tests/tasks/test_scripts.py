"""The recipe as a user runs it, at a tiny size: dVAE, codes, transformer, images, mistakes."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from dalle1 import DallE
from dalle1.clip import ClipArch, new_clip
from dalle1.commands import evaluate, sample
from dalle1.data import encoded as codes
from dalle1.data.codes import CodeSource
from dalle1.devices import PRECISIONS, pick_precision
from dalle1.model.transformer import Transformer
from dalle1.tasks import clip as train_clip
from dalle1.tasks import dvae as train_dvae
from dalle1.tasks import transformer as train_transformer
from dalle1.tasks.transformer import TRANSFORMER_PRESETS
from dalle1.text.bpe import Tokenizer
from dvae import DVAE

ROOT = Path(__file__).resolve().parents[2]
RUN = ["--steps", "2", "--batch-size", "2", "--num-workers", "0", "--device", "cpu"]
TINY_DVAE = [
    *("--model.image-size", "64", "--model.width", "8", "--model.codebook-size", "16"),
    *("--crop-size", "32", "--validation-images", "2", "--data", "toybox:4"),
]
TINY_TRANSFORMER = [
    *("--model.width", "16", "--model.depth", "2", "--model.heads", "2"),
    *("--model.text-len", "8", "--model.text-vocab", "260"),
    *("--vocab-captions", "4", "--prompts", "a red star"),
]
PROMPT = "A red star!"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train everything once, each part from what the one before wrote."""
    runs = tmp_path_factory.mktemp("runs")
    dvae = ["--dvae", str(runs / "dvae")]
    train_dvae.main(["toy", *TINY_DVAE, *RUN, "--out", str(runs / "dvae")])
    encode = [*dvae, "--data", "toybox:4", "--num-workers", "0", "--device", "cpu"]
    codes.main([*encode, "--out", str(runs / "codes")])
    train = ["toy", *dvae, *TINY_TRANSFORMER, *RUN]
    train_transformer.main([*train, "--data", str(runs / "codes"), "--out", str(runs / "model")])
    return runs


def run_sample(runs: Path, out: Path, *args: str) -> None:
    model = ["--model", str(runs / "model"), "--device", "cpu"]
    counts = ["--num-candidates", "3", "--num-images", "2"]
    sample.main([*model, *counts, *(args or (PROMPT,)), "--out", str(out)])


def test_every_training_leaves_what_the_next_one_reads(runs: Path) -> None:
    assert (runs / "dvae" / "latest" / "dvae.safetensors").is_file()
    index = json.loads((runs / "codes" / "codes.json").read_text())
    assert (index["grid_size"], index["codebook_size"]) == (8, 16)
    source = CodeSource(runs / "codes")
    assert len(source) == 4
    assert source.codes(0, random.Random(0)).shape == (8, 8)
    latest = runs / "model" / "latest"
    for name in ("dvae.safetensors", "transformer.safetensors", "vocab.json", "state.pt"):
        assert (latest / name).is_file()
    assert (runs / "model" / "samples" / "step-2.png").is_file()


def test_a_dvae_is_fine_tuned(runs: Path, tmp_path: Path) -> None:
    train = ["toy", *TINY_DVAE, *RUN, "--init", str(runs / "dvae"), "--learning-rate", "0"]
    train_dvae.main([*train, "--final-learning-rate", "0", "--out", str(tmp_path / "tuned")])
    loaded, tuned = DVAE.load(runs / "dvae"), DVAE.load(tmp_path / "tuned")
    for a, b in zip(loaded.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(a, b)  # it began there, and the learning rate was 0


def test_a_dvae_is_measured(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(runs / "dvae"), "--images", "20", "--out", str(tmp_path)]
    evaluate.main(["dvae", *flags, "--device", "cpu", "--precision", "fp32"])
    scores = json.loads((tmp_path / "dvae.json").read_text())["scores"]
    assert "psnr_hard" in capsys.readouterr().out
    assert (scores["images"], scores["codebook size"]) == (20, 16)
    assert 5 < scores["psnr_hard"] < 30
    assert 1 <= scores["codes_used"] <= 16
    with Image.open(tmp_path / "reconstructions.png") as image:
        assert image.width > 16 * 64


def test_fine_tuning_names_the_size_that_it_needs(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_dvae.main(["toy", "--init", str(runs / "dvae"), "--out", str(tmp_path)])
    printed = capsys.readouterr().err
    assert "add --model.image-size 64 --model.width 8 --model.codebook-size 16" in printed


@pytest.mark.parametrize("distortion", ["mse", "l1"])
def test_a_dvae_trains_on_images_without_captions(
    tmp_path: Path, distortion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for i in range(6):
        image = Image.effect_noise((20, 30) if i == 3 else (70 + i, 90), 100)
        image.save(tmp_path / "images" / f"{i}.png")
    flags = [*TINY_DVAE, *RUN, "--crops-per-image", "2", "--distortion", distortion]
    flags += ["--data", str(tmp_path / "images"), "--steps", "8", "--log-every", "1"]
    train_dvae.main(["toy", *flags, "--out", str(tmp_path / "run")])
    lines = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[7]["skipped/too small"] > 0
    assert "3.png (too small: an image of 20 × 30" in capsys.readouterr().out
    assert lines[0]["temperature"] == 1
    assert lines[0]["beta"] == 0
    last = {name.removeprefix("validation/") for name in lines[-1]}
    assert {"kl_nats", "kl_bits", "psnr_hard", "psnr_relaxed", "codes_used"} <= last
    assert not last & {"elbo_hard", "elbo_relaxed"}  # b was not trained


def test_a_transformer_trains_from_images(runs: Path, tmp_path: Path) -> None:
    train = ["toy", "--dvae", str(runs / "dvae"), "--data", "toybox:4", "--out", str(tmp_path)]
    train_transformer.main([*train, *TINY_TRANSFORMER, *RUN])
    assert (tmp_path / "latest" / "transformer.safetensors").is_file()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_lora_is_resumed_exactly_and_merged(runs: Path, tmp_path: Path, optimizer: str) -> None:
    train = ["small", "--dvae", str(runs / "dvae"), *RUN, "--optimizer", optimizer]
    train += ["--prompts", "a red star"]
    train += ["--data", str(runs / "codes"), "--init", str(runs / "model"), "--lora", "2"]
    train += ["--lora-alpha", "8", "--train-only", "image_head.bias", "--learning-rate"]
    train += ["0.01", "--steps", "4", "--save-every", "2", "--validate-every", "4", "--keep", "2"]
    train_transformer.main([*train, "--out", str(tmp_path)])
    tensors = "step-4/training.safetensors"
    expected = (tmp_path / tensors).read_bytes()
    names = {name.partition("/")[::2] for name in load(expected)}
    shutil.rmtree(tmp_path / "step-4")
    train_transformer.main([*train, "--out", str(tmp_path)])
    assert (tmp_path / tensors).read_bytes() == expected

    before, after = (Transformer.load(x).state_dict() for x in (runs / "model", tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = ("qkv.weight", "out.weight", "up.weight", "down.weight")
    assert changed == {"image_head.bias"} | {x for x in before if x.endswith(linear)}
    trained = {"image_head.bias"} | {name for kind, name in names if ".lora_" in name}
    assert {name for kind, name in names if kind in ("average", "mean")} == trained
    assert len(trained) == 1 + 2 * 4 * sum(x.endswith("qkv.weight") for x in before)
    image = DallE.from_pretrained(tmp_path, device="cpu").generate(PROMPT, num_candidates=1)[0]
    assert image.size == (64, 64)


def test_a_transformer_continues_from_smaller_images(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["toy", "--dvae", str(runs / "dvae"), "--data", "toybox:4", *TINY_TRANSFORMER, *RUN]
    half, whole, fixed = (tmp_path / name for name in ("half", "whole", "fixed"))
    train_transformer.main([*train, "--image-size", "32", "--out", str(half)])
    image = DallE.from_pretrained(half, device="cpu").generate(
        PROMPT, num_images=1, num_candidates=1
    )[0]
    assert image.size == (32, 32)
    still = ["--learning-rate", "0", "--final-learning-rate", "0"]
    train_transformer.main([*train, *still, "--init", str(half), "--out", str(whole)])
    loaded, grown = Transformer.load(half / "latest"), Transformer.load(whole / "latest")
    assert (loaded.config.grid_size, grown.config.grid_size) == (4, 8)
    assert loaded.rotary is not None
    assert grown.rotary is not None
    positions = torch.arange(16)  # a code stands where it stood, of every four the first
    there = 64 * (positions // 4 * 2) // 8 + positions % 4 * 2 + loaded.config.text_len
    torch.testing.assert_close(
        grown.rotary(there), loaded.rotary(positions + loaded.config.text_len), rtol=0, atol=0
    )
    for a, b in zip(loaded.parameters(), grown.parameters(), strict=True):
        torch.testing.assert_close(a, b)

    short = [*train, *still, "--init", str(half), "--model.text-len", "6"]
    train_transformer.main([*short, "--out", str(tmp_path / "short")])
    cut = Transformer.load(tmp_path / "short").state_dict()
    tokens = loaded.config.text_vocab + 6
    for name, tensor in loaded.state_dict().items():
        if name == "text_embedding.weight":
            tensor = torch.cat([tensor[:tokens], tensor[-1:]])
        elif name.startswith("text_head."):
            tensor = tensor[:tokens]
        torch.testing.assert_close(cut[name], tensor)
    longer = [*train, "--init", str(tmp_path / "short"), "--out", str(tmp_path / "long")]
    assert "--model.text-len is 6, not" in refused(train_transformer.main, longer, capsys)

    other = DVAE.load(runs / "dvae")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save(tmp_path / "other")
    train[2] = str(tmp_path / "other")
    with pytest.warns(UserWarning, match="half was trained on codes of another dVAE"):
        train_transformer.main([*train, *still, "--init", str(half), "--out", str(tmp_path / "o")])

    train += ["--model.positions", "learned"]  # a table has as many rows as the image
    train_transformer.main([*train, "--image-size", "32", "--out", str(fixed)])
    words = [*train, "--init", str(fixed), "--out", str(tmp_path / "more")]
    assert "grid_size is 4, not 8" in refused(train_transformer.main, words, capsys)


def test_images_scores_and_grid_are_written(runs: Path, tmp_path: Path) -> None:
    run_sample(runs, tmp_path, PROMPT, "--seed", "7", "--temperature", "0.9", "--top-k", "8")
    assert {p.name for p in tmp_path.iterdir()} == {"grid.png", "00.png", "01.png", "scores.json"}
    dtype = pick_precision("auto", torch.device("cpu"))
    automatic = next(name for name in PRECISIONS if PRECISIONS[name] == dtype)
    settings = {
        "model": str(runs / "model"),
        "clip": "none",
        "num_candidates": 3,
        "num_images": 2,
        "seed": 7,
        "temperature": 0.9,
        "top_k": 8,
        "top_p": 1.0,
        "typical": 1.0,
        "guidance": 1.0,
        "negative_prompt": "",
        "rerank": "none",
        "resample": "none",
        "resample_every": 4,
        "precision": automatic,
        "image": None,
        "keep_rows": None,
        "mask": None,
    }
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [s["file"] for s in scores] == ["00.png", "01.png"]
    assert [(s["candidate"], s["seed"], s["score"]) for s in scores] == [(0, 7, None), (1, 7, None)]
    for number, name in enumerate(("00.png", "01.png")):
        with Image.open(tmp_path / name) as image:
            assert image.size == (64, 64)
            assert image.text["prompt"] == PROMPT
            assert json.loads(image.text["settings"]) == {**settings, "candidate": number}
    with Image.open(tmp_path / "grid.png") as image:
        assert image.text["prompt"] == PROMPT
        assert json.loads(image.text["settings"]) == settings
        assert image.width >= 128


def test_with_a_clip_the_best_come_first(runs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"width": 32, "layers": 1, "text_width": 32, "text_layers": 1, "embed_dim": 16}
    clip = new_clip(Tokenizer.train([PROMPT], 260), ClipArch(image_size=32, text_len=12, **small))
    clip.save_pretrained(tmp_path / "clip")
    run_sample(runs, tmp_path / "out", PROMPT, "--clip", str(tmp_path / "clip"))
    scores = [s["score"] for s in json.loads((tmp_path / "out" / "scores.json").read_text())]
    assert len(scores) == 2
    assert scores[0] >= scores[1]
    assert all(-1 <= s <= 1 for s in scores)


def test_the_same_seed_writes_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run_sample(runs, tmp_path / name, PROMPT, "--seed", seed)
    for file in ("00.png", "01.png", "grid.png", "scores.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    images = [Image.open(tmp_path / name / "00.png").tobytes() for name in ("a", "c")]
    assert images[0] != images[1]


def test_several_prompts_get_a_folder_each(runs: Path, tmp_path: Path) -> None:
    run_sample(runs, tmp_path, "a red star", "ein blauer Würfel", "A red star!")
    folders = {"a-red-star", "ein-blauer-würfel", "a-red-star-2"}
    assert {p.name for p in tmp_path.iterdir()} == folders
    with Image.open(tmp_path / "a-red-star-2" / "00.png") as image:
        assert image.text["prompt"] == "A red star!"


def test_the_default_folder_is_named_by_the_prompt(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample.main(
        [
            PROMPT,
            "--model",
            str(runs / "model"),
            "--num-candidates",
            "1",
            "--num-images",
            "1",
            "--device",
            "cpu",
        ]
    )
    assert (tmp_path / "outputs" / "a-red-star" / "00.png").is_file()


def refused(
    main: Callable[[list[str]], None], args: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command that must fail; return its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-images", "9"], "--num-images is 9, expected 1 to --num-candidates, 3"),
        (["--num-images", "0"], "--num-images is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "2"], "--top-p is 2"),
        (["--top-k", "-2"], "--top-k is -2"),
        (["--model", "nowhere"], "no model at nowhere"),
        (["--clip", "PROJECT"], "error: "),
        (["--device", "quantum"], "device 'quantum' is not available"),
        (["--out", "FILE"], "use another --out"),
        (["--out", "FILE/below"], "use another --out"),
    ],
)
def test_mistakes_in_sampling_are_reported_in_a_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    (tmp_path / "empty").mkdir()
    args = [a.replace("FILE", str(file)).replace("PROJECT", str(tmp_path / "empty")) for a in args]
    base = [PROMPT, "--model", str(runs / "model"), "--num-candidates", "3", "--num-images", "2"]
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert message in refused(sample.main, [*base, *out, *args], capsys)
    assert file.read_text() == "in the way"


def test_an_empty_prompt_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "the prompt is empty" in refused(sample.main, [" ", *out], capsys)
    assert "the prompt is empty" in refused(sample.main, ["a star", "", *out], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["transformer.safetensors", "dvae.safetensors", "vocab.json"])
def test_a_damaged_model_is_reported_in_a_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in ("transformer.safetensors", "dvae.safetensors", "vocab.json"):
        content = (runs / "model" / "latest" / file).read_bytes()
        (model / file).write_bytes(content[:99] if file == name else content)
    args = [PROMPT, "--model", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert name in refused(sample.main, args, capsys)


def test_mistakes_in_training_are_reported_in_a_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = ["toy", "--out", str(tmp_path / "out")]
    dvae, transformer = train_dvae.main, train_transformer.main
    for main, presets in (
        (dvae, "toy, toy-finetune, small, paper"),
        (transformer, "toy, toy-128, small, base, 1b"),
    ):
        line = refused(main, ["huge", *toy[1:]], capsys)
        assert f"the first argument is 'huge', expected a preset: {presets}" in line
    line = refused(transformer, [*toy, "--dvae", "nowhere", "--device", "cpu"], capsys)
    assert "no image tokenizer in nowhere" in line
    line = refused(dvae, [*toy, *TINY_DVAE[:-2], "--data", "nowhere", "--device", "cpu"], capsys)
    assert "no data at 'nowhere'" in line
    assert "device 'quantum'" in refused(dvae, [*toy, "--device", "quantum"], capsys)
    other = str(tmp_path / "other")
    dvae(["toy", *TINY_DVAE, *RUN, "--seed", "1", "--out", other])
    args = [*toy, "--dvae", other, "--data", str(runs / "codes"), "--device", "cpu"]
    assert "are of another dVAE" in refused(transformer, args, capsys)


COMMON = ("--data", "--out", "--steps", "--batch-size", "--seed", "--device")


@pytest.mark.parametrize("module", [train_dvae, train_transformer, train_clip])
@pytest.mark.parametrize("words", [["--help"], ["toy", "--help"]], ids=" ".join)
def test_help_names_the_flags(
    module: object, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        module.main(words)  # type: ignore[attr-defined]
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [flag for flag in COMMON if flag not in text] == []


def test_help_of_sampling_names_the_flags_without_torch() -> None:
    program = (
        "import sys\nfrom dalle1.commands import sample\n"
        "try: sample.main(['--help'])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    flags = "num-candidates num-images seed temperature top-k top-p typical guidance out model clip"
    assert [f for f in flags.split() if f"--{f}" not in run.stdout] == []


def test_earlier_samples_are_removed_and_other_files_stay(runs: Path, tmp_path: Path) -> None:
    run_sample(runs, tmp_path, PROMPT)
    (tmp_path / "02.png").write_bytes(b"of another command")
    (tmp_path / "2024.png").write_bytes(b"a holiday")
    run_sample(runs, tmp_path, PROMPT, "--num-images", "1")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"grid.png", "00.png", "02.png", "2024.png", "scores.json"}


def test_resuming_with_other_settings_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["toy", "--dvae", str(runs / "dvae"), "--data", "toybox:4", "--out", str(tmp_path)]
    train_transformer.main([*train, *TINY_TRANSFORMER, *RUN])
    vocabulary = (tmp_path / "latest" / "vocab.json").read_bytes()
    again = [*train, *TINY_TRANSFORMER, *RUN, "--seed", "5"]
    assert "seed was 0 and is 5" in refused(train_transformer.main, again, capsys)
    assert (tmp_path / "latest" / "vocab.json").read_bytes() == vocabulary


def test_captions_that_are_cut_are_counted(runs: Path, tmp_path: Path) -> None:
    preset = TRANSFORMER_PRESETS["toy"]
    short = replace(preset.model, text_vocab=300, text_len=9)
    config = replace(
        preset, model=short, dvae=runs / "dvae", data="toybox:8", out=tmp_path, device="cpu"
    )
    message = r"of the first 8 captions are cut: .* to \d\d tokens, and the model reads 8; raise"
    with pytest.warns(UserWarning, match=message):
        train_transformer.TransformerTask(config)


def test_workers_are_sent_no_model(runs: Path, tmp_path: Path) -> None:
    config = replace(
        TRANSFORMER_PRESETS["toy"], dvae=runs / "dvae", data="toybox:4", out=tmp_path, device="cpu"
    )
    training = train_transformer.TransformerTask(config)
    loader = training.loader
    assert len(pickle.dumps((loader.source, loader.prepare))) < 200_000


def test_damaged_data_ends_a_training_and_its_workers(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "bad.png").write_bytes(b"no image")
    (data / "bad.txt").write_text("a red star")
    for name in "ab":
        Image.new("RGB", (128, 128)).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text("a black square")
    flags = ["--data", str(data), "--out", str(tmp_path / "out"), "--num-workers", "1"]
    flags += ["--validation-pairs", "1", "--model.image-size", "32"]
    done = subprocess.run(
        [sys.executable, "train_clip.py", "toy", *flags],
        cwd=ROOT,
        timeout=1200,
        capture_output=True,
    )
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("error: ")
    assert "are damaged, more than --max-bad-fraction 0.05 allows" in last
    assert "× not an image" in last
    assert f"Skipping {data / 'bad.png'} (not an image" in done.stdout.decode()
