"""The towers: ours against open_clip's and the paper's words, transformers' as they are, sizes."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dalle1.clip import Clip, ClipArch, new_clip
from dalle1.clip.resnet import ModifiedResNet
from dalle1.tasks.clip import CLIP_PRESETS
from dalle1.text.bpe import Tokenizer

RESNET: dict[str, Any] = {"layers": (2, 1, 1, 2), "width": 16, "patch_size": None}
TEXT = {"text_width": 32, "text_layers": 1, "embed_dim": 16, "text_len": 12}


@pytest.fixture(scope="module")
def resnet() -> ModifiedResNet:
    torch.manual_seed(0)
    model = ModifiedResNet((2, 1, 1, 2), image_size=64, width=16, heads=8, embed_dim=24).eval()
    with torch.no_grad():  # nothing at a special value: no gain of 0, no mean of 0
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.2 * torch.rand(buffer.shape))
    return model


def open_clip_resnet() -> Any:
    """Load open_clip's file alone: its package imports torchvision, which the tower never uses."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package open_clip_torch; `make test` installs it")
    names = ("open_clip_alone", "open_clip_alone.utils", "open_clip_alone.modified_resnet")
    package, unused = ModuleType(names[0]), ModuleType(names[1])
    package.__path__ = []
    unused.freeze_batch_norm_2d = unused.feature_take_indices = None  # type: ignore[attr-defined]
    file = Path(spec.origin).with_name("modified_resnet.py")
    alone = importlib.util.spec_from_file_location(names[2], file)
    assert alone is not None
    assert alone.loader is not None
    module = importlib.util.module_from_spec(alone)
    sys.modules.update(zip(names, (package, unused, module)))
    try:
        alone.loader.exec_module(module)
    finally:
        for name in names:
            del sys.modules[name]
    return module.ModifiedResNet


def test_the_resnet_is_open_clips(resnet: ModifiedResNet) -> None:
    theirs = open_clip_resnet()([2, 1, 1, 2], output_dim=24, heads=8, image_size=64, width=16)
    theirs.load_state_dict(resnet.state_dict())
    images = torch.rand(3, 3, 64, 64)
    for training in (False, True):  # with statistics that were learned, and with the batch's
        with torch.no_grad():
            expected = theirs.train(training)(images)
            found = copy.deepcopy(resnet).train(training)(images)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def as_the_paper_says(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Compute the tower from its description, position by position, with none of our modules."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        mean, var = (weights[f"{name}.running_{s}"].view(shape) for s in ("mean", "var"))
        gain, bias = (weights[f"{name}.{s}"].view(shape) for s in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    def conv(x: torch.Tensor, name: str, **options: int) -> torch.Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], **options)

    def halved(x: torch.Tensor) -> torch.Tensor:
        corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return sum(corners) / 4  # type: ignore[return-value]

    x = norm(conv(images, "conv1", stride=2, padding=1), "bn1").relu()
    x = norm(conv(x, "conv2", padding=1), "bn2").relu()
    x = halved(norm(conv(x, "conv3", padding=1), "bn3").relu())
    for stage, depth in enumerate((2, 1, 1, 2), 1):
        for block in range(depth):
            at, shrink = f"layer{stage}.{block}", stage > 1 and block == 0
            y = norm(conv(x, f"{at}.conv1"), f"{at}.bn1").relu()
            y = norm(conv(y, f"{at}.conv2", padding=1), f"{at}.bn2").relu()
            y = norm(conv(halved(y) if shrink else y, f"{at}.conv3"), f"{at}.bn3")
            if block == 0:
                short = halved(x) if shrink else x
                x = norm(conv(short, f"{at}.downsample.0"), f"{at}.downsample.1")
            x = (x + y).relu()
    positions = x.flatten(2).mT  # [B, HW, C]
    positions = torch.cat([positions.mean(1, keepdim=True), positions], 1)
    positions = positions + weights["attnpool.positional_embedding"]
    attention = nn.MultiheadAttention(positions.shape[-1], 8, batch_first=True)
    projections = [weights[f"attnpool.{name}_proj.weight"] for name in "qkv"]
    biases = [weights[f"attnpool.{name}_proj.bias"] for name in "qkv"]
    attention.in_proj_weight.data = torch.cat(projections)
    attention.in_proj_bias.data = torch.cat(biases)
    attention.out_proj.weight = nn.Parameter(torch.eye(positions.shape[-1]))
    nn.init.zeros_(attention.out_proj.bias)
    pooled = attention(positions, positions, positions)[0][:, 0]
    return F.linear(pooled, weights["attnpool.c_proj.weight"], weights["attnpool.c_proj.bias"])


def test_the_resnet_is_what_the_paper_describes(resnet: ModifiedResNet) -> None:
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = as_the_paper_says(resnet.state_dict(), images)
        torch.testing.assert_close(resnet(images), expected, atol=1e-4, rtol=1e-4)


def test_a_new_resnet_equals_its_shortcuts() -> None:
    model = ModifiedResNet((1, 1, 1, 1), image_size=32, width=8, heads=4, embed_dim=8)
    block = model.layer1[0].train()
    x = torch.rand(4, 8, 8, 8)
    torch.testing.assert_close(block(x), block.downsample(x).relu())
    assert model.attnpool.q_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


class Vocabulary:
    """What a model asks of a tokenizer."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bos_token_id, self.eos_token_id, self.pad_token_id = size - 2, size - 1, size - 1

    def __len__(self) -> int:
        return self.size


# Tokens, and weights: of OpenAI's released models with their vocabulary, of ours with a full one.
SIZES = {
    "toy": (1027, 3_570_805),
    "small": (1027, 1_912_473),
    "rn50": (49_408, 102_007_137),
    "vit-b-32": (49_408, 151_277_313),
    "vit-b-16": (49_408, 149_620_737),
    "vit-l-14": (49_408, 427_616_513),
}


@pytest.mark.parametrize("name", CLIP_PRESETS)
def test_presets_have_the_sizes_of_the_released_models(name: str) -> None:
    from dalle1.clip.towers import arch_of, new_model

    with torch.device("meta"):
        model = new_model(CLIP_PRESETS[name].model, Vocabulary(SIZES[name][0]))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == SIZES[name][1]
    assert arch_of(model) == CLIP_PRESETS[name].model


def small(**size: Any) -> Clip:
    torch.manual_seed(0)
    vocabulary = Tokenizer.train(["a red cube", "a blue ball"], 300)
    return new_clip(vocabulary, ClipArch(**{**TEXT, "image_size": 32, **size}))


@pytest.fixture(scope="module")
def clip() -> Clip:
    return small(**RESNET)


def test_a_clip_with_a_resnet_comes_back_the_same(clip: Clip, tmp_path: Path) -> None:
    image = Image.effect_noise((40, 32), 90).convert("RGB")
    clip.save_pretrained(tmp_path)
    loaded = Clip.from_pretrained(tmp_path)
    assert loaded.image_size == 32
    assert loaded.arch() == clip.arch()
    torch.testing.assert_close(
        loaded.score("a red cube", [image]), clip.score("a red cube", [image])
    )
    expected = clip.model.visual(clip.preprocess([image]))
    torch.testing.assert_close(loaded.embed_images([image]), F.normalize(expected, dim=-1))


def test_text_is_read_at_its_end_by_a_causal_tower(clip: Clip) -> None:
    whole = clip.embed_text(["a red cube"])
    beside = clip.embed_text(["a red cube", "a blue cube red"])
    torch.testing.assert_close(beside[:1], whole)
    hidden = [
        clip.model.text_model(**clip.tokenize([text])).last_hidden_state[0, :3]
        for text in ("a red cube", "a red ball")
    ]
    torch.testing.assert_close(hidden[0], hidden[1])  # start, a, red: nothing of what follows


@pytest.mark.parametrize("size", [{"layers": 1, "width": 32}, RESNET])
def test_the_bias_of_the_sigmoid_is_saved_apart(size: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from dalle1.clip.losses import prepare_for

    clip = small(**size)
    prepare_for(clip.model, "sigmoid")
    clip.model.logit_bias.data.fill_(-6.5)
    clip.save_pretrained(tmp_path, dtype=torch.float16)
    assert "logit_bias" not in load_file(tmp_path / "model.safetensors")
    assert Clip.from_pretrained(tmp_path).model.logit_bias.item() == -6.5


def test_infonce_leaves_no_bias_without_a_gradient(tmp_path: Path) -> None:
    from dalle1.clip.losses import pair_loss, prepare_for

    clip = small(layers=1, width=32)
    prepare_for(clip.model, "sigmoid")
    clip.save_pretrained(tmp_path)
    model = Clip.from_pretrained(tmp_path).model.requires_grad_(True)
    prepare_for(model, "infonce")
    ids = clip.tokenize(["a red cube", "a blue ball"])["input_ids"]
    pair_loss(model, torch.rand(2, 3, 32, 32), ids).total.backward()
    assert [name for name, x in model.named_parameters() if x.grad is None] == []
    Clip(model, clip.tokenizer, clip.processor).save_pretrained(tmp_path)
    assert not hasattr(Clip.from_pretrained(tmp_path).model, "logit_bias")


def test_only_cpus_train_by_the_eager_attention() -> None:
    from dalle1.clip.towers import fast_attention

    clip = small(layers=1, width=32)
    for device, expected in (("cuda", "sdpa"), ("cpu", "eager")):
        fast_attention(clip.model, torch.device(device))
        assert clip.model.config.vision_config._attn_implementation == expected


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"image_size": 100}, "image_size is 100: 16, patch_size, must divide it"),
        ({**RESNET, "image_size": 48}, "image_size is 48: 32, the reduction of the ResNet"),
        ({"patch_size": None}, "expected one number and a patch_size for a ViT"),
        ({"layers": (1, 1, 1, 1)}, "expected one number and a patch_size for a ViT"),
        ({"width": 100}, "head_dim is 32: it must divide both towers' widths, 100 and 128"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipArch(**size)
