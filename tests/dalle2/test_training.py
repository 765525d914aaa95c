"""From a user's own images to a model: autoencoder, embeddings, prior and decoder, all tiny."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_model import CAPTIONS, tiny_model
from tiny_training import (
    AUTOENCODER,
    DECODER,
    PRIOR,
    UPSAMPLER,
    Folders,
    make_folders,
    save_clip,
    train,
)

from dalle1 import export
from dalle1.commands import sample as command
from dalle1.training.checkpoint import TENSORS_NAME
from dalle2 import embedded
from dalle2.ar_prior import ARPrior, load_prior
from dalle2.autoencoder import Autoencoder, Pixels
from dalle2.loading import load_pipeline
from dalle2.pipeline import Unclip
from dalle2.prior import DiffusionPrior
from dalle2.prior_metrics import prior_metrics
from dalle2.tasks import ar_prior, autoencoder, decoder, prior, upsampler
from dalle2.upsampler import Upsampler, reduced


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("unclip"))


def test_a_decoder_reads_the_pooled_caption_without_an_image(
    folders: Folders, tmp_path: Path
) -> None:
    models = ["--autoencoder", str(folders.autoencoder), "--clip", str(folders.clip)]
    flags = ["--data", str(folders.embedded), "--out", str(tmp_path), "--steps", "1"]
    reads = ["--embedding", "none", "--model.text-pool"]
    decoder.main([*DECODER, *models, *flags, *reads])
    model = load_pipeline(tmp_path)
    assert model.decoder.config.pooled_width == 8
    assert len(next(model.sample(["a red cube"], num_candidates=2, steps=2))) == 2


def test_an_autoencoder_reports_its_reconstructions(folders: Folders) -> None:
    lines = [json.loads(x) for x in (folders.autoencoder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "total" in line] == [1, 2]
    assert "validation/psnr" in lines[-1]
    model = Autoencoder.load(folders.autoencoder)
    assert not model.latent_std.equal(torch.ones(4))  # measured before it was saved


def test_a_better_decoder_of_an_autoencoder_joins_the_same_model(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(folders.images), "--steps", "2"]
    init, tuned = ["--init", str(folders.autoencoder)], tmp_path / "tuned"
    autoencoder.main([*AUTOENCODER, *data, *init, "--decoder-only", "--out", str(tuned)])
    again = ["--init", str(tuned), "--decoder-only", "--out", str(tmp_path / "again")]
    autoencoder.main([*AUTOENCODER, *data, *again])
    autoencoder.main([*AUTOENCODER, *data, *init, "--out", str(tmp_path / "other")])
    names = [folders.autoencoder, *(tmp_path / name for name in ("tuned", "again", "other"))]
    before, *after = (Autoencoder.load(name) for name in names)
    images = torch.rand(2, 3, 16, 16)
    for model, same in zip(after, (True, True, False), strict=True):
        assert model.encode(images).equal(before.encode(images)) == same
        assert not model.decode(torch.ones(1, 4, 2, 2)).equal(before.decode(torch.ones(1, 4, 2, 2)))
    train(decoder, folders, tmp_path / "decoder", 1)
    words = ["--model", str(tmp_path / "decoder"), "--out", str(tmp_path / "model")]
    export.main([*words, "--dtype", "fp32", "--autoencoder", str(tmp_path / "again")])
    found = load_pipeline(tmp_path / "model", device="cpu").image_tokenizer
    assert found.decode(torch.ones(1, 4, 2, 2)).equal(after[1].decode(torch.ones(1, 4, 2, 2)))
    for wrong, message in (
        ([*words, "--autoencoder", str(tmp_path / "other")], "has other latents than the decoder"),
        ([*words, "--autoencoder", str(tmp_path)], "no Autoencoder in"),
    ):
        with pytest.raises(SystemExit):
            export.main(wrong)
        assert message in capsys.readouterr().err
    start = tmp_path / "start"
    late = ["--init", str(start), "--decoder-only", "--out", str(tmp_path / "late")]
    for source, steps in ((folders.autoencoder, "1"), (tmp_path / "other", "2")):
        shutil.rmtree(start, ignore_errors=True)
        shutil.copytree(source, start)
        ended = contextlib.nullcontext() if steps == "1" else pytest.raises(SystemExit)
        with ended:
            autoencoder.main([*AUTOENCODER, *data[:2], *late, "--steps", steps])
    assert "has changed since this training of its decoder began" in capsys.readouterr().err
    for start, message in (
        (tmp_path, "needs an autoencoder in --init"),
        (None, "needs --init FOLDER"),
    ):
        flags = [] if start is None else ["--init", str(start)]
        with pytest.raises(SystemExit):
            autoencoder.main([*AUTOENCODER, *data, "--decoder-only", *flags])
        assert message in capsys.readouterr().err


def test_embeddings_are_those_of_the_models(folders: Folders) -> None:
    source = embedded.EmbeddedSource(folders.embedded, "encode")
    numbers = torch.stack([torch.from_numpy(source.crops(i)[0, 0].copy()) for i in range(40)])
    assert numbers.shape == (40, 4 * 2 * 2 + 8)
    assert source.captions(1) == [CAPTIONS[1]]
    torch.testing.assert_close(
        numbers[:, -8:].float().norm(dim=1), torch.ones(40), atol=2e-3, rtol=0
    )
    sizes = source.sized_crop(0, random.Random(0))[1].tolist()
    assert sizes == [36, 40, 0, 1, 16, 16]  # scaled to 16 × 18, of which the centre is cut


def test_each_crop_keeps_its_own_sizes(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    noise = torch.randint(0, 256, (48, 40, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "0.txt").write_text("noise")
    models = ["--autoencoder", str(folders.autoencoder), "--clip", str(folders.clip)]
    flags = ["--data", str(tmp_path / "images"), "--num-workers", "0", "--crops", "4"]
    embedded.main([*models, *flags, "--out", str(tmp_path / "embedded")])
    source = embedded.EmbeddedSource(tmp_path / "embedded", "encode")
    found = [source.sized_crop(0, random.Random(seed)) for seed in range(20)]
    by_numbers = {numbers.numpy().tobytes(): tuple(sizes.tolist()) for numbers, sizes in found}
    for seed in range(20):
        numbers = source.codes(0, random.Random(seed)).numpy().tobytes()
        assert by_numbers[numbers] == tuple(found[seed][1].tolist())
    assert len({sizes[2:4] for sizes in by_numbers.values()}) > 1


def test_the_usual_sizes_are_those_of_one_image() -> None:
    unknown = torch.full((1, 6), torch.nan)
    assert decoder.usual_sizes(unknown) == ()
    rows = [[10.0, 90, 0, 1, 16, 16], [60, 20, 3, 0, 16, 16], [99, 99, 0, 0, 16, 16]]
    assert decoder.usual_sizes(torch.cat([unknown, torch.tensor(rows)])) == tuple(rows[1])


def test_a_decoder_without_attention_is_refused(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--autoencoder", str(folders.autoencoder), "--clip", str(folders.clip)]
    flags = ["--data", str(folders.embedded), "--model.attention", "8", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        decoder.main([*DECODER, *models, *flags, "--steps", "1"])
    assert "the sides of this data are [2]; without attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module", [decoder, prior, ar_prior, upsampler], ids=lambda module: module.__name__
)
def test_a_training_resumes_to_the_last_digit(
    module: object, folders: Folders, tmp_path: Path
) -> None:
    whole = train(module, folders, tmp_path / "whole", 3)
    train(module, folders, tmp_path / "parts", 1)
    parts = train(module, folders, tmp_path / "parts", 3)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not parts[name].equal(whole[name])] == []
    lines = [json.loads(x) for x in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    numbers = {"loss", "own_image" if module in (prior, ar_prior) else "loss_0"}
    assert {f"validation/{name}" for name in numbers} < lines[-1].keys()


def test_a_decoder_of_pixels_learns_its_variance(folders: Folders, tmp_path: Path) -> None:
    pixels, clip = tmp_path / "embedded", ["--clip", str(folders.clip)]
    data = ["--data", str(folders.images), "--num-workers", "0", "--image-size", "8"]
    embedded.main(["--autoencoder", "pixels", *clip, *data, "--out", str(pixels)])
    paper = ["--model.objective", "epsilon", "--model.learns-variance"]
    flags = [*DECODER, *paper, "--autoencoder", "pixels", "--data", str(pixels), *clip]
    flags += ["--model.attention", "8"]
    decoder.main([*flags, "--out", str(tmp_path / "decoder"), "--steps", "1"])
    line = json.loads((tmp_path / "decoder/log.jsonl").read_text().splitlines()[0])
    assert line["total"] == pytest.approx(line["mse"] + line["bound"], rel=1e-4)
    model = load_pipeline(tmp_path / "decoder", device="cpu")
    assert isinstance(model.image_tokenizer, Pixels)
    how: Any = {"num_candidates": 2, "steps": 3, "guidance": 3.0}
    for sampler in ("ancestral", "dpm-solver"):
        found = model.candidates("a red cube", sampler=sampler, **how)
        assert [candidate.image.size for candidate in found] == [(8, 8)] * 2
        assert found[0].codes.abs().max() <= 1  # x₀ is clipped


@pytest.mark.parametrize("preset", ["imagen", "sdxl"])  # ldm is a part of sdxl
def test_a_decoder_learns_by_other_text_encoders(
    preset: str, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It resumes to the last digit, also with captions that it no longer remembers."""
    tiny_model().save_pretrained(tmp_path / "dalle")
    clip = f"clip:{folders.clip}"
    names = {"imagen": [f"dalle-middle:{tmp_path}/dalle"]}
    names["sdxl"] = [clip, *names["imagen"]]
    out, data = tmp_path / "out", ["--data", str(folders.embedded), "--clip", str(folders.clip)]
    flags = [preset, *DECODER[1:], *data, "--autoencoder", str(folders.autoencoder)]
    flags += ["--text-encoders", *names[preset]]
    decoder.main([*flags, "--out", str(out), "--steps", "3"])
    decoder.main([*flags, "--out", str(tmp_path / "parts"), "--steps", "1"])
    decoder.main([*flags, "--out", str(tmp_path / "parts"), "--steps", "3"])
    whole, parts = (load_file(x / "latest" / TENSORS_NAME) for x in (out, tmp_path / "parts"))
    assert [name for name in whole if not parts[name].equal(whole[name])] == []
    model = load_pipeline(out, device="cpu")
    middle = "dalle-middle:text-"
    stored = ["clip:text-0", f"{middle}1"] if preset == "sdxl" else [f"{middle}0"]
    assert model.decoder.config.text_encoders == tuple(stored)
    tiny_model(scale=0.4).transformer.save(tmp_path / "dalle")
    with pytest.raises(SystemExit):
        decoder.main([*flags, "--out", str(tmp_path / "parts"), "--steps", "4"])
    assert "is another file than before" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(tmp_path / "dalle")  # the model has its own
    assert model.decoder.config.size_features == (256 if preset == "sdxl" else 0)
    exported = tmp_path / "model"
    export.main(["--model", str(out), "--out", str(exported)])
    assert (exported / f"text-{len(names[preset]) - 1}").is_dir()
    few = ["--num-candidates", "2", "--steps", "2", "--device", "cpu", "--guidance", "3"]
    command.main(["a (red:2) cube", "--model", str(exported), "--out", str(tmp_path / "x"), *few])
    assert Image.open(tmp_path / "x/00.png").size == (16, 16)
    assert model.candidates("(a red cube:2)", num_candidates=1, steps=1, weighted=True)


def test_embeddings_of_another_clip_are_refused(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = folders._replace(clip=save_clip(tmp_path / "clip", 1))
    for module, what in ((decoder, "another CLIP; embed"), (prior, "another CLIP than")):
        with pytest.raises(SystemExit):
            train(module, other, tmp_path / "out", 1)
        assert f"the embeddings in {folders.embedded} are of {what}" in capsys.readouterr().err


def test_folders_of_other_sizes_are_refused_together(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--autoencoder", str(folders.autoencoder), "--clip", str(folders.clip)]
    data = ["--data", str(folders.images), "--num-workers", "0", "--image-size", "8"]
    embedded.main([*models, *data, "--out", str(tmp_path / "small")])
    both = f"{folders.embedded}::1,{tmp_path}/small::1"
    with pytest.raises(SystemExit):
        prior.main([*PRIOR, "--data", both, "--clip", str(folders.clip), "--out", str(tmp_path)])
    assert "store different counts of values per image" in " ".join(capsys.readouterr().err.split())


def test_data_that_is_not_embedded_is_refused(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(decoder, folders._replace(embedded=folders.images), tmp_path / "out", 1)
    assert "holds no embeddings; run dalle1 embed" in capsys.readouterr().err


def test_prior_metrics_by_hand() -> None:
    images, captions = torch.eye(3), torch.eye(3).roll(1, 0)
    perfect = dict(prior_metrics(images, images, captions))
    assert perfect == {
        "own_image": 1,
        "caption": 0,
        "data_caption": 0,
        "first": 1,
        "rank": 1,
        "other_caption": pytest.approx(0),
    }
    worst = dict(prior_metrics(-images, images, captions))
    assert (worst["own_image"], worst["first"], worst["rank"]) == (-1, 0, 3)


def test_a_trained_decoder_and_prior_are_joined_and_sampled_by_command(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"decoder": decoder, "prior": prior, "upsampler": upsampler}
    for name, module in parts.items():
        train(module, folders, tmp_path / name, 1)
    train(ar_prior, folders, tmp_path / "ar", 1)
    joined = [f for name in ("prior", "upsampler") for f in (f"--{name}", str(tmp_path / name))]
    export.main(["--model", str(tmp_path / "decoder"), *joined, "--out", str(tmp_path / "model")])
    flags = ["--num-candidates", "2", "--steps", "2", "--device", "cpu", "--model"]
    out = ["--out", str(tmp_path / "red")]
    command.main(["a red cube", *flags, str(tmp_path / "model"), *out])
    assert [Image.open(tmp_path / f"red/0{i}.png").size for i in range(2)] == [(32, 32)] * 2
    no = ["--upsampler-steps", "0", "--num-images", "1", "--clip-guidance", "1"]
    command.main(["a red cube", *flags, str(tmp_path / "model"), *out, *no])
    image = Image.open(tmp_path / "red/00.png")
    assert image.size == (16, 16)
    settings = json.loads(image.info["settings"])  # type: ignore[arg-type]
    asked = {"steps": 2, "upsampler_steps": 0, "clip_guidance": 1.0, "embedding": "prior"}
    assert {name: settings[name] for name in asked} == asked
    model = load_pipeline(tmp_path / "model", device="cpu")
    assert isinstance(model, Unclip)
    assert isinstance(model.prior, DiffusionPrior)
    assert min(model.prior.config.errors) > 0  # measured before it was saved
    assert model.generation.guidance == 2
    few = {"steps": 2, "prior_steps": 2, "seed": 1}
    images = {c.index: c.image for c in model.candidates("a red cube", num_candidates=3, **few)}
    alone = next(model.sample(["a red cube"], num_candidates=3, share=(2, 3), **few))
    assert alone[0].image.tobytes() == images[2].tobytes()
    model.prior = load_prior(tmp_path / "ar")
    assert isinstance(model.prior, ARPrior)
    assert model.candidates("a red cube", num_candidates=1, prior_guidance=2.0, **few)
    for embedding in ("caption", "none"):
        assert model.candidates("a red cube", num_candidates=1, embedding=embedding, **few)
    for wrong, message in (
        (["--steps", "0"], "steps is 0, expected at least 1"),
        (["--temperature", "0.5"], "temperature is 0.5, expected 1.0: a diffusion model"),
        (["--rerank", "likelihood"], "rerank is 'likelihood', expected clip or none"),
        (["--upsampler-steps", "-1"], "upsampler-steps is -1, expected at least 0"),
        (["--upsampler-steps", "1001"], "upsampler-steps is 1001, expected at most 1000"),
        (["--preview"], "--preview shows rows of codes, and a DALL·E 2 has none"),
    ):
        with pytest.raises(SystemExit):
            command.main(["a red cube", *out, *flags, str(tmp_path / "model"), *wrong])
        assert message in capsys.readouterr().err
    alone_decoder = load_pipeline(tmp_path / "decoder", device="cpu")
    with pytest.raises(ValueError, match="this model has no prior"):
        alone_decoder.sample(["a"], embedding="prior")
    with pytest.raises(ValueError, match="upsampler_steps is 4, expected 0: this model has no"):
        alone_decoder.sample(["a"], upsampler_steps=4)
    shutil.rmtree(tmp_path / "model" / "clip")  # the bundled one then takes its part
    with pytest.raises(
        ValueError, match=r"was trained with .* \(without clip/, the bundled CLIP\)"
    ):
        load_pipeline(tmp_path / "model", device="cpu")
    save_clip(tmp_path / "model" / "clip", 1)
    with pytest.raises(ValueError, match="was trained with the autoencoder and CLIP"):
        load_pipeline(tmp_path / "model", device="cpu")


def test_an_upsampler_learns_from_what_the_autoencoder_restores(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = ["--data", str(folders.images), "--autoencoder", str(folders.autoencoder)]
    words = [*UPSAMPLER, *reads, "--out", str(tmp_path), "--steps", "1"]
    with pytest.raises(SystemExit):
        upsampler.main(words)
    assert "--crop-size is 8, expected a multiple of 16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        upsampler.main([*words, "--crop-size", "16", "--model.image-size", "24"])
    assert "model.image_size is 24, expected a multiple of 16" in capsys.readouterr().err
    upsampler.main([*words, "--crop-size", "16"])
    state = torch.load(tmp_path / "latest" / "state.pt", weights_only=True)
    assert state["contents"]["autoencoder"]
    model, codec = Upsampler.load(tmp_path), Autoencoder.load(folders.autoencoder)
    config = replace(upsampler.UPSAMPLER_PRESETS["small"], model=model.config, crop_size=16)
    where = {"data": str(folders.images), "out": tmp_path, "device": "cpu", "num_workers": 0}
    task = upsampler.UpsamplerTask(replace(config, autoencoder=folders.autoencoder, **where))
    small = reduced(task.held, 2)
    torch.testing.assert_close(task.reduced(task.held), codec.decode(codec.encode(small)))
    assert not task.reduced(task.held).allclose(small, atol=1e-2)

    def errors() -> torch.Tensor:
        t = torch.full((len(task.held),), 500)
        sharp = torch.ones_like(t, dtype=torch.bool)
        rng = torch.Generator().manual_seed(0)
        return task.errors(model, task.held, t, rng, sharp).total

    restored = errors()
    task.autoencoder = None
    assert not errors().allclose(restored)
