"""Training a VQ-VAE and a VQGAN: losses by hand, the codebook's averages, whole trainings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalle1.tasks.vqvae import VQVAE_PRESETS, VQVAETask
from dalle1.training.engines.base import LossModule
from dalle1.training.loop import fit
from dalle1.vqgan import VQGAN, VQGANConfig
from dalle1.vqgan.codebook import CodebookAverage
from dalle1.vqgan.losses import (
    MIN_PATCH_SIZE,
    PatchDiscriminator,
    adaptive_weight,
    commitment_loss,
    hinge_loss,
    reconstruction_error,
)


def test_reconstruction_error_by_hand() -> None:
    images, others = torch.tensor([0.0, 0.5]), torch.tensor([0.25, 1.0])
    assert reconstruction_error(images, others, "l1") == pytest.approx(0.375)
    assert reconstruction_error(images, others, "mse") == pytest.approx((0.0625 + 0.25) / 2)


def test_commitment_moves_features_alone() -> None:
    features = torch.tensor([1.0, 2.0], requires_grad=True)
    vectors = torch.tensor([0.0, 4.0], requires_grad=True)
    loss = commitment_loss(features, vectors)
    loss.backward()
    assert float(loss) == pytest.approx((1 + 4) / 2)
    assert features.grad is not None
    assert features.grad.tolist() == [1.0, -2.0]
    assert vectors.grad is None


def test_hinge_loss_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert float(hinge_loss(real, fake)) == pytest.approx((0.25 + 0.5) / 2)


def test_adaptive_weight_equalises_gradients() -> None:
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(last.square().sum(), last.sum(), last)  # gradients (6, 8), (1, 1)
    assert float(weight) == pytest.approx(10 / (2**0.5 + 1e-4), rel=1e-5)
    assert not weight.requires_grad


def test_patches_of_the_discriminator() -> None:
    model, images = PatchDiscriminator(width=8), torch.rand(2, 3, 64, 64, requires_grad=True)
    verdicts = model(images)
    assert verdicts.shape == (2, 1, 6, 6)
    assert model(torch.rand(1, 3, MIN_PATCH_SIZE, MIN_PATCH_SIZE)).shape == (1, 1, 1, 1)
    verdicts[0, 0, 0, 0].backward()
    assert images.grad is not None
    assert images.grad[1].abs().max() == 0  # no sample depends on another


def test_codes_follow_the_mean_of_their_features() -> None:
    average = CodebookAverage(2, 1, decay=0.5, restart_below=0.0)
    average.counts.copy_(torch.tensor([2.0, 2.0]))
    average.sums.copy_(torch.tensor([[2.0], [8.0]]))
    codebook = torch.tensor([[1.0], [4.0]])
    features = torch.tensor([0.0, 1.0, 5.0, 6.0]).view(1, 1, 2, 2)
    codes = torch.tensor([0, 0, 1, 1]).view(1, 2, 2)
    restarts = average.update(codebook, features, codes, torch.Generator().manual_seed(0))
    assert restarts == 0
    assert codebook.flatten().tolist() == [(2 + 1) / 4, (8 + 11) / 4]


def test_unused_codes_restart_at_features() -> None:
    average = CodebookAverage(8, 2, decay=0.99, restart_below=0.03)
    codebook, features = torch.zeros(8, 2), torch.randn(1, 2, 3, 3)
    rng = torch.Generator().manual_seed(0)
    codes = torch.zeros(1, 3, 3, dtype=torch.int64)
    average.update(codebook, features, codes, rng)
    vectors = features.permute(0, 2, 3, 1).reshape(-1, 2)
    nearest = torch.cdist(codebook[1:], vectors).min(1).values
    torch.testing.assert_close(nearest, torch.zeros(7))  # code 0 is in use


def config(out: Path, **changes: object):
    small = VQVAE_PRESETS["small"]
    model = VQGANConfig(
        image_size=32,
        width=32,
        multipliers=(1, 1),
        blocks=1,
        attention=(),
        latent_width=32,
        code_width=8,
        codebook_size=16,
    )
    return replace(
        small,
        out=out,
        model=model,
        crop_size=32,
        data="toybox:40",
        steps=6,
        batch_size=4,
        log_every=2,
        save_every=3,
        validate_every=6,
        validation_images=4,
        num_workers=0,
        precision="fp32",
        device="cpu",
        warmup_steps=1,
        **changes,
    )


def test_training_resumes_exactly(tmp_path) -> None:
    def weights(out: Path, *steps: int) -> dict[str, torch.Tensor]:
        for step in steps:
            settings = config(out, schedule_steps=6)
            fit(VQVAETask(replace(settings, steps=step)), replace(settings, steps=step))
        return load_file(out / "latest" / "raw" / "image_tokenizer.safetensors")

    whole, parts = weights(tmp_path / "a", 6), weights(tmp_path / "b", 3, 6)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert VQGAN.load(tmp_path / "a").config == config(tmp_path).model


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_codes_are_averaged_in_fp32_in_every_precision(tmp_path, precision: str) -> None:
    task = VQVAETask(config(tmp_path))
    batch = {"images": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)}
    total, _ = LossModule(task, precision)(batch, 0, torch.Generator().manual_seed(0))
    assert total.isfinite()
    mean = task.model.average.sums / task.model.average.counts[:, None]
    assert torch.equal(task.model.tokenizer.quantize.embedding.weight, mean)
    assert mean.dtype == torch.float32
    assert not torch.equal(mean, mean.bfloat16().float())


def test_a_vqgan_trains_generator_and_discriminator_apart(tmp_path) -> None:
    task = VQVAETask(config(tmp_path, adversarial_weight=0.5, discriminator_width=8))
    batch = {"images": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)}
    generator, discriminator = task.losses(batch, 0, torch.Generator().manual_seed(0))
    judge = list(task.model.discriminator.parameters())
    coder = [p for p in task.model.tokenizer.parameters() if p.requires_grad]

    def moved(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[bool]:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [g is not None and bool(g.any()) for g in grads]

    assert not any(moved(generator.total, judge))
    assert any(moved(generator.total, coder))
    assert any(moved(discriminator.total, judge))
    assert not any(moved(discriminator.total, coder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": 31}, "crop_size is 31"),
        ({"commitment_weight": -1.0}, "commitment_weight is -1.0"),
        ({"codebook_decay": 1.0}, "codebook_decay is 1.0"),
        ({"zero": 2}, "needs unsharded codes"),
    ],
)
def test_config_rejects(tmp_path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config(tmp_path), **changes)
