"""Stage 1: the paper's sizes and blocks, codes, weights on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from dvae import DVAE, DVAEConfig
from dvae.losses import squeeze_pixels, unsqueeze_pixels
from dvae.model import FILE_NAME, Block, upsample

TINY = DVAEConfig(image_size=16, width=8, codebook_size=20, code_width=12)


def tiny(config: DVAEConfig = TINY) -> DVAE:
    torch.manual_seed(0)
    return DVAE(config).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=seeded())


# The network


def test_paper_size_has_exactly_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = DVAE(DVAEConfig())
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    assert (model.codebook_size, model.grid_size) == (8192, 32)
    assert model.encoder.groups[0][0].gain == 1 / 64
    assert model.decoder.input.weight.shape == (128, 8192, 1, 1)


@pytest.mark.parametrize(
    ("width", "height", "across", "blocks", "codebook", "code_width"),
    [(4, 8, 8, 1, 5, 3), (8, 16, 40, 2, 20, 12), (12, 24, 16, 3, 33, 1)],
)
def test_shapes(
    width: int, height: int, across: int, blocks: int, codebook: int, code_width: int
) -> None:
    model = tiny(
        DVAEConfig(
            width=width, blocks_per_group=blocks, codebook_size=codebook, code_width=code_width
        )
    )
    images = random_images(2, height, across)
    stats, logits = model(images, 1.0, seeded())
    codes = model.encode(images)
    assert logits.shape == (2, height // 8, across // 8, codebook)
    assert stats.shape == (2, 6, height, across)
    assert codes.shape == (2, height // 8, across // 8)
    assert codes.dtype == torch.int64
    assert model.decode(codes).shape == images.shape


def conv(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)


def reference_block(weights: dict[str, Tensor], name: str, x: Tensor, gain: float) -> Tensor:
    y = x
    for i in range(1, 5):
        y = conv(weights, f"{name}.residual.conv_{i}", F.relu(y))
    changes = f"{name}.identity.weight" in weights
    return (conv(weights, f"{name}.identity", x) if changes else x) + gain * y


def reference_groups(weights: dict[str, Tensor], side: str, x: Tensor) -> Tensor:
    for group in range(4):
        if group and side == "encoder":
            x = F.max_pool2d(x, 2)
        elif group:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for block in range(2):
            x = reference_block(weights, f"{side}.groups.{group}.{block}", x, 1 / 64)
    return conv(weights, f"{side}.output", F.relu(x))


def test_network_is_that_of_the_paper_s_table() -> None:
    # Large biases and residual paths, so that a wrong order, gain or padding shows.
    model = tiny()
    for name, weight in model.named_parameters():
        scale = 20.0 if ".residual.conv_4" in name else 1.5
        weight.data = torch.randn(weight.shape, generator=seeded(len(name))) * scale / 8
    weights = dict(model.named_parameters())
    images = random_images(2, 16, 24)
    x = conv(weights, "encoder.input", 0.8 * images + 0.1)
    logits = reference_groups(weights, "encoder", x).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.logits(images), logits, rtol=1e-4, atol=1e-4)

    z = torch.rand(2, 2, 3, 20, generator=seeded()).softmax(-1)
    x = conv(weights, "decoder.input", z.permute(0, 3, 1, 2))
    stats = reference_groups(weights, "decoder", x)
    torch.testing.assert_close(model.decoder(z), stats, rtol=1e-4, atol=1e-4)
    kernels = [weights[f"encoder.groups.1.0.residual.conv_{i}.weight"] for i in range(1, 5)]
    assert [k.shape[-1] for k in kernels] == [3, 3, 3, 1]
    kernels = [weights[f"decoder.groups.1.0.residual.conv_{i}.weight"] for i in range(1, 5)]
    assert [k.shape[-1] for k in kernels] == [1, 3, 3, 3]


def test_weights_are_initialised_as_published() -> None:
    model = tiny(DVAEConfig(width=32, codebook_size=256, code_width=32))
    scaled = {}
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            assert not weight.any(), name
        else:
            scaled[name] = weight.detach() * math.sqrt(weight[0].numel())  # in units of 1/√(c·k²)
    for name, weight in scaled.items():  # five sigma of a sample's standard deviation
        assert weight.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * weight.numel())), name
    assert torch.cat([w.flatten() for w in scaled.values()]).mean().abs() < 0.01


@pytest.mark.parametrize(("residual_gain", "gain"), [(None, 1 / 144), (0.5, 0.5), (0.0, 0.0)])
def test_residual_gain(residual_gain: float | None, gain: float) -> None:
    assert DVAEConfig(blocks_per_group=3, residual_gain=residual_gain).block_gain == gain
    block = Block(8, 8, [3, 3, 3, 1], gain)
    x = torch.randn(1, 8, 4, 4, generator=seeded())
    torch.testing.assert_close(block(x), x + gain * block.residual(x))


def test_logit_gain_and_floor_on_the_scale() -> None:
    plain = tiny()
    other = tiny(DVAEConfig(**{**vars(TINY), "logit_gain": 3.0, "min_log_scale": 0.2}))
    images = random_images()
    torch.testing.assert_close(other.logits(images), 3 * plain.logits(images))
    before = plain.decoder(plain.encode(images))
    after = other.decoder(plain.encode(images))
    assert before[:, 3:].min() < 0.2
    assert torch.equal(after[:, :3], before[:, :3])
    assert torch.equal(after[:, 3:], before[:, 3:].clamp_min(0.2))


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (1, 3, 16, 20), (1, 4, 16, 16), (3, 16, 16)])
def test_images_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = tiny()
    for use in (model.encode, lambda images: model(images, 1.0)):
        with pytest.raises(ValueError, match="multiples of 8") as error:
            use(torch.zeros(shape))
        assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 100},
        {"image_size": 0},
        {"width": 6},
        {"width": 0},
        {"blocks_per_group": 0},
        {"codebook_size": 0},
        {"code_width": 0},
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        DVAEConfig(**wrong)


# Codes


def test_codes_are_the_argmax_without_noise() -> None:
    model, images = tiny().train(), random_images(3)
    codes = model.encode(images)
    assert torch.equal(codes, model.logits(images).argmax(-1))
    for _ in range(3):
        torch.rand(7)  # the global generator has no effect
        assert torch.equal(model.encode(images), codes)
    assert torch.equal(torch.cat([model.encode(x[None]) for x in images]), codes)
    assert len(codes.unique()) > 1


def test_sampled_codes_are_as_frequent_as_the_encoder_states() -> None:
    model, image = tiny(), random_images(1)
    with torch.no_grad():
        probabilities = model.logits(image)[0].softmax(-1)
    codes = model.sample_codes(image.expand(4_000, -1, -1, -1), seeded())
    shares = F.one_hot(codes, 20).float().mean(0)
    errors = (probabilities * (1 - probabilities) / 4_000).sqrt()
    assert ((shares - probabilities).abs() < 5 * errors + 1e-6).all()
    assert torch.equal(model.sample_codes(image, seeded(1)), model.sample_codes(image, seeded(1)))


def test_decoding_codes_is_decoding_one_hot_weights() -> None:
    model = tiny()
    codes = torch.randint(20, (2, 3, 2), generator=seeded())
    stats = model.decoder(F.one_hot(codes, 20).float())
    torch.testing.assert_close(model.decoder(codes), stats)
    expected = ((stats[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(model.decode(codes), expected)
    for wrong in (codes.float(), codes[0]):
        with pytest.raises(ValueError, match=r"expected integers \[B, h, w\]"):
            model.decode(wrong)


def test_pixels_are_squeezed_and_back() -> None:
    images = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(squeeze_pixels(images), torch.tensor([0.1, 0.3, 0.9]))
    torch.testing.assert_close(unsqueeze_pixels(squeeze_pixels(images)), images)
    outside = unsqueeze_pixels(torch.tensor([0.01, 0.99]))
    assert outside.tolist() == [0.0, 1.0]


# On disk


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_saved_and_loaded(tmp_path: Path, dtype: torch.dtype | None) -> None:
    config = DVAEConfig(**{**vars(TINY), "logit_gain": 2.0, "min_log_scale": -3.0})
    model = tiny(config).train()
    path = model.save(tmp_path / "deep" / "folder", dtype)
    assert [f.name for f in path.parent.iterdir()] == [FILE_NAME]
    loaded = DVAE.load(path.parent)
    assert loaded.config == config
    assert not loaded.training
    for name, weight in model.state_dict().items():
        expected = weight if dtype is None else weight.to(dtype).float()
        assert torch.equal(loaded.state_dict()[name], expected), name
        assert loaded.state_dict()[name].dtype == torch.float32
    with safe_open(path, "pt") as file:
        assert file.get_tensor("encoder.input.weight").dtype == (dtype or torch.float32)
        assert json.loads(file.metadata()["config"])["logit_gain"] == 2.0
    if dtype is None:
        assert torch.equal(loaded.encode(random_images()), model.encode(random_images()))


def config_of(**changes: object) -> dict[str, str]:
    return {"config": json.dumps({**vars(TINY), **changes})}


def test_files_that_hold_no_dvae_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no DVAE in .*nowhere: the folder does not exist; check"):
        DVAE.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no DVAE in .*expected the file dvae.safetensors"):
        DVAE.load(tmp_path)
    path = tiny().save(tmp_path)
    whole = path.read_bytes()
    weights = load(whole)  # in memory: a mapped file must not change

    def damage(kind: str) -> None:
        match kind:
            case "cut":
                path.write_bytes(whole[: len(whole) // 2])
            case "empty":
                path.write_bytes(b"")
            case "text":
                path.write_text("this is no model" * 20)
            case "no config":
                save_file(weights, path)
            case "unknown field":
                save_file(weights, path, metadata=config_of(colour="red"))
            case "impossible size":
                save_file(weights, path, metadata=config_of(width=6))
            case "other width":
                save_file(weights, path, metadata=config_of(width=16))
            case "missing weight":
                rest = {k: v for k, v in weights.items() if k != "decoder.output.bias"}
                save_file(rest, path, metadata=config_of())

    for kind in (
        *("cut", "empty", "text", "no config"),
        *("unknown field", "impossible size", "other width", "missing weight"),
    ):
        damage(kind)
        with pytest.raises(ValueError, match="is damaged, or holds no DVAE") as error:
            DVAE.load(tmp_path)
        assert str(path) in str(error.value), kind
        assert "\n" not in str(error.value), kind


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("code_width", [8, 32])  # 32: the first block has no convolution beside it
def test_decoding_without_gradients_is_the_same_bit_for_bit(blocks: int, code_width: int) -> None:
    torch.manual_seed(0)
    config = DVAEConfig(
        image_size=32, width=4, blocks_per_group=blocks, codebook_size=16, code_width=code_width
    )
    decoder = DVAE(config).decoder
    codes = torch.randint(16, (2, 4, 4))
    expected = decoder(codes)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(decoder(codes), expected)
    block, x = decoder.groups[1][0], torch.randn(2, 32, 3, 5)
    torch.testing.assert_close(block.forward_upsampled(x), block(upsample(x)))
