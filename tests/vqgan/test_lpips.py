"""LPIPS equals taming's, from its files in all their forms; a training uses it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from originals import import_original
from torch import Tensor, nn

from dalle1.importers.lpips import load_lpips
from dalle1.tasks.vqvae import VQVAE_PRESETS, VQVAETask
from dalle1.training.loop import fit
from dalle1.vqgan.losses import PerceptualVQLoss
from dalle1.vqgan.lpips import LINEAR, STAGES


def vgg16(widths: tuple[int, ...]) -> nn.Sequential:
    """Return the layers of VGG16, without its linear ones."""
    layers: list[nn.Module] = []
    before = 3
    for stage, width in zip(STAGES, widths, strict=True):
        for _ in stage:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Write narrow networks as torchvision and the package lpips do."""
    torch.manual_seed(0)
    tensors = {f"features.{k}": t for k, t in vgg16((4,) * 5).state_dict().items()}
    paths = [tmp_path / "vgg16-397923af.pth", tmp_path / "vgg.pth"]
    torch.save(tensors, paths[0], _use_new_zipfile_serialization=False)
    torch.save({name: torch.rand(1, 4, 1, 1) for name in LINEAR}, paths[1])
    return paths


@torch.no_grad()
def test_it_is_that_of_taming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    package = ModuleType("torchvision")
    package.models = ModuleType("models")  # type: ignore[attr-defined]
    network = nn.Module()
    network.features = vgg16((64, 128, 256, 512, 512))
    package.models.vgg16 = lambda pretrained: network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    original = import_original("taming.modules.losses.lpips")
    monkeypatch.setattr(original.LPIPS, "load_from_pretrained", lambda self: None)
    theirs = original.LPIPS().eval()
    for name in LINEAR:
        theirs.get_parameter(name).copy_(torch.rand(theirs.get_parameter(name).shape))
    state = {f"loss.perceptual_loss.{name}": t for name, t in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    ours = load_lpips([tmp_path / "last.ckpt"])
    one, other = torch.rand(2, 2, 3, 32, 32)
    expected = theirs(2 * one - 1, 2 * other - 1).mean()
    torch.testing.assert_close(ours(one, other), expected, rtol=1e-5, atol=0)
    assert ours(one, one) == 0


def test_gradients_are_finite_where_features_are_zero(files: list[Path]) -> None:
    model = load_lpips(files)
    images = torch.zeros(1, 3, 16, 16, requires_grad=True)
    model(images, torch.rand(1, 3, 16, 16)).backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert not list(model.parameters())


def test_mixed_precision_changes_nothing(files: list[Path]) -> None:
    model = load_lpips(files)
    for scale in (0.0, 60.0):  # fp16 cannot hold the squares of large features
        model.features_0_weight.mul_(scale)
        images, others = torch.rand(2, 1, 3, 16, 16)
        expected = model(images, others)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(model(images, others), expected)


def test_a_vqgan_trains_with_it(files: list[Path], tmp_path: Path) -> None:
    small = VQVAE_PRESETS["small"]
    model = replace(small.model, image_size=32, codebook_size=8, latent_width=8, code_width=8)
    config = replace(
        small,
        model=model,
        lpips=tuple(files),
        crop_size=32,
        adversarial_weight=0.5,
        discriminator_width=8,
        validation_images=2,
        validate_every=1,
        steps=1,
        batch_size=2,
        num_workers=0,
        device="cpu",
        precision="fp32",
        data="toybox:4",
        out=tmp_path / "out",
    )
    task = VQVAETask(config)
    batch: dict[str, Tensor] = {"images": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)}
    parts: Any = task.losses(batch, 0, torch.Generator())[0]
    assert isinstance(parts, PerceptualVQLoss)
    assert parts.perceptual > 0
    assert parts.total.requires_grad
    fit(task, config)
    assert (tmp_path / "out" / "latest" / "image_tokenizer.safetensors").is_file()
    with pytest.raises(ValueError, match="crop_size is 8, expected 16 or more with lpips"):
        replace(config, crop_size=8)
    with pytest.raises(ValueError, match="crop_size is 16, expected 24 or more with adversarial"):
        replace(config, crop_size=16)


def test_other_files_are_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tensor lin0\.model\.1\.weight; expected vgg16"):
        load_lpips(files[:1])
    with pytest.raises(ValueError, match=r"has no tensor features\.0\.weight; expected vgg16"):
        load_lpips(files[1:])
    torch.save({name: torch.rand(1, 5, 1, 1) for name in LINEAR}, files[1])
    with pytest.raises(ValueError, match="does not match LPIPS on VGG16"):
        load_lpips(files)
    files[0].write_text("<html>")
    with pytest.raises(ValueError, match=r"cannot be read .*; expected weights of VGG16 or LPIPS"):
        load_lpips(files)
    with pytest.raises(FileNotFoundError):
        load_lpips([tmp_path / "none.pth"])
