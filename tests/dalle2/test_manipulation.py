"""Variations, interpolations and text diffs: the ends are the images themselves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import tiny_model
from tiny_unclip import randomized, tiny_clip, tiny_decoder

from dalle1.clip import Clip
from dalle1.commands import blend, edit, vary
from dalle2 import manipulation
from dalle2.autoencoder import Autoencoder, AutoencoderConfig
from dalle2.manipulation import Manipulator, slerp
from dalle2.pipeline import Unclip


@pytest.fixture(scope="module")
def manipulator() -> Manipulator:
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(image_size=32, width=4, code_width=8)).eval()
    decoder = tiny_decoder(side=4, multipliers=(1, 2), attention=(4,))
    return Manipulator(model=Unclip(autoencoder, randomized(decoder, 0.1), tiny_clip()), steps=20)


def image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)


def difference(a: Image.Image, b: Image.Image) -> float:
    """Return the largest difference of two images, of 255."""
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max())


def restored(manipulator: Manipulator, original: Image.Image) -> Image.Image:
    """Return an image as the autoencoder alone restores it."""
    model, pixels = manipulator.model, torch.from_numpy(np.asarray(original) / 255).float()
    return model.decode(model.image_tokenizer.encode(pixels.permute(2, 0, 1)[None]))[0]


def test_an_image_comes_back_from_its_embedding_and_noise(manipulator: Manipulator) -> None:
    a, b = image(1), image(2)
    back = manipulator.restore(manipulator.invert([a, b]))
    for original, found in zip((a, b), back, strict=True):
        assert difference(found, restored(manipulator, original)) <= 2
    assert difference(back[0], back[1]) > 10


def test_variations_differ_and_without_new_noise_are_the_image(manipulator: Manipulator) -> None:
    exact = manipulator.vary(image(1), 2, eta=0)
    assert difference(exact[0], restored(manipulator, image(1))) <= 2
    varied = manipulator.vary(image(1), 2, eta=1)
    assert min(difference(varied[0], other) for other in (varied[1], exact[0])) > 2
    assert difference(manipulator.vary(image(1), 1, eta=1)[0], varied[0]) <= 1  # alone, the same
    assert difference(manipulator.vary(image(1), 1, eta=1, seed=1)[0], varied[0]) > 2


def test_a_blend_begins_and_ends_with_the_images(manipulator: Manipulator) -> None:
    row = manipulator.blend(image(1), image(2), 5)
    assert len(row) == 5
    assert difference(row[0], restored(manipulator, image(1))) <= 2
    assert difference(row[-1], restored(manipulator, image(2))) <= 2
    one_noise = manipulator.blend(image(1), image(2), 3, noise_seed=0)
    assert difference(one_noise[0], row[0]) > 2


def test_an_edit_turns_the_embedding_and_keeps_the_noise(
    manipulator: Manipulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[manipulation.Inverted] = []
    monkeypatch.setattr(Manipulator, "restore", lambda _, inverted: seen.append(inverted))
    manipulator.edit(image(1), "a red cube", "a blue cube", 3, strength=0.5)
    (found,) = seen
    assert found.noise[0].equal(found.noise[2])
    clip: Clip = manipulator.model.encoder
    before, after = clip.embed_text(["a red cube", "a blue cube"])
    direction = torch.nn.functional.normalize(after - before, dim=0)
    towards = found.embedding @ direction
    assert towards[0] < towards[1] < towards[2]
    torch.testing.assert_close(found.embedding.norm(dim=1), torch.ones(3))
    # Half of the way on the sphere is half of the angle.
    whole = math.acos(float(towards[0]))
    assert math.acos(float(towards[2])) == pytest.approx(whole / 2, abs=1e-3)
    with pytest.raises(ValueError, match="the CLIP reads 'a cube' and 'a cube' alike"):
        manipulator.edit(image(1), "a cube", "a cube", 2)


def test_slerp_keeps_to_the_sphere() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    found = slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))
    expected = torch.tensor([[2.0, 0.0], [3 / math.sqrt(2), 3 / math.sqrt(2)], [0.0, 4.0]])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slerp(a, 3 * a, torch.tensor([0.5])), 2 * a)


def test_the_commands_write_images(
    manipulator: Manipulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dalle2.loading.load_pipeline", lambda *_, **__: manipulator.model)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for i, file in enumerate(files):
        image(i).save(file)
    common = ["--model", "x", "--num-images", "3", "--steps", "2"]
    for module, words in (
        (vary, [str(files[0])]),
        (blend, [str(file) for file in files]),
        (edit, [str(files[0]), "--before", "a red cube", "--after", "a blue cube"]),
    ):
        out = tmp_path / module.__name__
        module.main([*words, *common, "--out", str(out)])
        assert len(list(out.glob("0*.png"))) == 3
        assert Image.open(out / "02.png").size == (32, 32)


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (vary, ["IMAGE", "--eta", "2"], "--eta is 2, expected 0 to 1"),
        (vary, ["IMAGE", "--steps", "0"], "--steps is 0, expected at least 1"),
        (vary, ["IMAGE", "--num-images", "0"], "--num-images is 0, expected at least 1"),
        (vary, ["IMAGE", "--steps", "1001"], "--steps is 1001, expected at most 1000"),
        (vary, ["nowhere.png"], "nowhere.png"),
        (edit, ["IMAGE", "--after", "a", "--strength", "7"], "--strength is 7, expected 0 to 1"),
    ],
)
def test_bad_input_is_one_line(
    manipulator: Manipulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: object,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("dalle2.loading.load_pipeline", lambda *_, **__: manipulator.model)
    image(0).save(tmp_path / "a.png")
    words = [str(tmp_path / "a.png") if word == "IMAGE" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        module.main([*words, "--model", "x", "--out", str(tmp_path / "out")])  # type: ignore[attr-defined]
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_other_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    image(0).save(tmp_path / "a.png")
    with pytest.raises(SystemExit):
        vary.main([str(tmp_path / "a.png"), "--model", str(tmp_path / "model")])
    assert "a DALL·E v1, expected a DALL·E 2" in capsys.readouterr().err
