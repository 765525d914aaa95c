"""The dVAE of the paper (§2.1, A.3; the released code's layer table), at any size.

B batch, H W image in pixels, h w grid of codes (h = H / 8), V codebook size.
Images are [B, 3, H, W] in [0, 1]; codes are [B, h, w] integers; logits are [B, h, w, V].

| encoder                          | decoder                        |
|----------------------------------|--------------------------------|
| 7×7 conv, 3 → n                  | 1×1 conv, V → m  (the codebook)|
| group 1: n, at H; max-pool 2     | group 1: 8n at H/8; nearest ×2 |
| group 2: 2n, at H/2; max-pool 2  | group 2: 4n at H/4; nearest ×2 |
| group 3: 4n, at H/4; max-pool 2  | group 3: 2n at H/2; nearest ×2 |
| group 4: 8n, at H/8              | group 4: n, at H               |
| ReLU, 1×1 conv → V               | ReLU, 1×1 conv → 6: μ, ln b    |

There is no normalisation anywhere; each block is `identity(x) + gain · residual(x)`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dalle1.storage import load_weights, model_folder, save_weights
from dvae.gumbel import gumbel_noise, gumbel_softmax
from dvae.losses import squeeze_pixels, unsqueeze_pixels

DOWNSAMPLING = 8
FILE_NAME = "dvae.safetensors"


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """The size of a dVAE. The defaults are the paper's: 53.8M + 43.8M parameters."""

    image_size: int = 256
    """Side of the images in pixels, a multiple of 8. The network itself accepts any such size."""
    width: int = 256
    """Channels at full resolution, n, a multiple of 4; deeper groups have 2n, 4n and 8n."""
    blocks_per_group: int = 2
    """Residual blocks in each of the four groups."""
    codebook_size: int = 8192
    """Number of codes, V."""
    code_width: int = 128
    """Channels of a code's embedding at the decoder's input, m."""
    logit_gain: float = 1.0
    """Factor on the encoder's logits. Paper: 1. Above 1, logits exceed the Gumbel noise sooner,
    which keeps a short training from collapsing to a few codes."""
    residual_gain: float | None = None
    """Factor on each residual path. None: the paper's 1 / (number of blocks)²."""
    min_log_scale: float | None = None
    """Floor on ln b of the likelihood. Paper: None. A floor keeps the flat parts of simple
    images from dominating the gradient."""

    def __post_init__(self) -> None:
        if self.image_size % DOWNSAMPLING or self.image_size < DOWNSAMPLING:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of 8, such as 256"
            )
        if self.width % 4 or self.width < 4:
            raise ValueError(f"width is {self.width}, expected a multiple of 4, such as 256")
        for name in ("blocks_per_group", "codebook_size", "code_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def grid_size(self) -> int:
        """Codes along each side of an image."""
        return self.image_size // DOWNSAMPLING

    @property
    def block_gain(self) -> float:
        """Factor on each residual path."""
        if self.residual_gain is not None:
            return self.residual_gain
        return 1 / (4 * self.blocks_per_group) ** 2


class Conv2d(nn.Conv2d):
    """A convolution with "same" zero padding, weights N(0, 1/(c_in·k²)) and zero biases."""

    bias: Tensor

    def __init__(self, width_in: int, width_out: int, kernel: int) -> None:
        super().__init__(width_in, width_out, kernel, padding=(kernel - 1) // 2)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight[0].numel()))
        nn.init.zeros_(self.bias)


class Block(nn.Module):
    """A bottleneck residual block: y = identity(x) + gain · residual(x), ReLU before each conv."""

    def __init__(self, width_in: int, width_out: int, kernels: list[int], gain: float) -> None:
        super().__init__()
        hidden = width_out // 4
        widths = [width_in, hidden, hidden, hidden, width_out]
        self.gain = gain
        self.identity = Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            # All but the first run in place; `identity` also reads the first's input.
            layers[f"relu_{i + 1}"] = nn.ReLU(inplace=i > 0)
            layers[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel)
        self.residual = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.identity(x), self.residual(x), alpha=self.gain)

    def forward_upsampled(self, x: Tensor) -> Tensor:
        """Return `forward(upsample(x))`, for a block that begins with a 1×1 convolution.

        A 1×1 convolution reads single pixels. So it runs before pixels are repeated: the same
        numbers, in a quarter of the work.
        """
        hidden = self.residual[:2](x)
        identity, hidden = upsample(self.identity(x)), upsample(hidden)
        return torch.add(identity, self.residual[2:](hidden), alpha=self.gain)


def upsample(x: Tensor) -> Tensor:
    """Repeat every pixel in both directions: [B, C, H, W] → [B, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _group(width_in: int, width_out: int, kernels: list[int], config: DVAEConfig) -> nn.Sequential:
    widths = [width_in] + [width_out] * config.blocks_per_group
    return nn.Sequential(*(Block(a, b, kernels, config.block_gain) for a, b in pairwise(widths)))


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1], already squeezed by φ, to logits [B, h, w, V]."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        n = config.width
        self.input = Conv2d(3, n, 7)
        widths = [n, n, 2 * n, 4 * n, 8 * n]
        self.groups = nn.ModuleList(
            _group(widths[i], widths[i + 1], [3, 3, 3, 1], config) for i in range(4)
        )
        self.output = Conv2d(8 * n, config.codebook_size, 1)
        self.logit_gain = config.logit_gain

    def forward(self, squeezed: Tensor) -> Tensor:
        x = self.input(squeezed.contiguous(memory_format=torch.channels_last))
        for i, group in enumerate(self.groups):
            x = group(x) if i == 0 else group(F.max_pool2d(x, 2))
        # The released code keeps this convolution in fp32 under mixed precision. The gain
        # multiplies the weights, which are fewer than the logits.
        weight, bias = self.output.weight * self.logit_gain, self.output.bias * self.logit_gain
        with torch.autocast(x.device.type, enabled=False):
            logits = F.conv2d(F.relu(x).float(), weight, bias)
        return rearrange(logits, "b v h w -> b h w v")


class Decoder(nn.Module):
    """Codes [B, h, w], or weights over them [B, h, w, V], to the likelihood's [B, 6, H, W]."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        n = config.width
        self.input = Conv2d(config.codebook_size, config.code_width, 1)
        widths = [config.code_width, 8 * n, 4 * n, 2 * n, n]
        self.groups = nn.ModuleList(
            _group(widths[i], widths[i + 1], [1, 3, 3, 3], config) for i in range(4)
        )
        self.output = Conv2d(n, 6, 1)
        self.min_log_scale = config.min_log_scale

    def embed(self, codes: Tensor) -> Tensor:
        """Apply the first convolution: a matrix product for weights, a look-up for integers."""
        codebook = rearrange(self.input.weight, "m v 1 1 -> v m")
        # The released code keeps this convolution in fp32 under mixed precision.
        with torch.autocast(codes.device.type, enabled=False):
            x = codes.float() @ codebook if codes.is_floating_point() else codebook[codes]
            return rearrange(x + self.input.bias, "b h w m -> b m h w")

    def forward(self, codes: Tensor) -> Tensor:
        x = self.groups[0](self.embed(codes))
        for group in self.groups[1:]:
            assert isinstance(group, nn.Sequential)
            first = group[0]
            assert isinstance(first, Block)
            if torch.is_grad_enabled():  # sums of gradients are rounded in the order of the layers
                x = group(upsample(x))
            else:
                x = group[1:](first.forward_upsampled(x))
        stats = self.output(F.relu(x)).float()
        if self.min_log_scale is None:
            return stats
        mean, log_scale = stats.chunk(2, dim=1)
        return torch.cat([mean, log_scale.clamp_min(self.min_log_scale)], dim=1)


class DVAE(nn.Module):
    """The discrete VAE: images to codes and back; an `ImageTokenizer` to stage 2."""

    downsampling = DOWNSAMPLING
    """Pixels per code, along each side."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def codebook_size(self) -> int:
        """V: number of codes."""
        return self.config.codebook_size

    @property
    def image_size(self) -> int:
        """Side of its images in pixels."""
        return self.config.image_size

    @property
    def grid_size(self) -> int:
        """Codes along each side of an image."""
        return self.config.grid_size

    def logits(self, images: Tensor) -> Tensor:
        """Score every code at every position: [B, 3, H, W] in [0, 1] → [B, h, w, V]."""
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or any(s % DOWNSAMPLING for s in images.shape[2:])
        ):
            raise ValueError(
                f"images are {tuple(images.shape)}, expected [B, 3, H, W] with H and W multiples "
                "of 8; resize or crop them first"
            )
        return self.encoder(squeeze_pixels(images))

    def forward(
        self, images: Tensor, temperature: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode, sample relaxed codes and decode them: the training pass.

        Returns: the likelihood's parameters [B, 6, H, W] and the raw logits [B, h, w, V].
        """
        logits = self.logits(images)
        return self.decoder(gumbel_softmax(logits, temperature, generator)), logits

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the most likely codes, without noise: [B, 3, H, W] in [0, 1] → [B, h, w]."""
        return self.logits(images).argmax(-1)

    @torch.no_grad()
    def sample_codes(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample codes from the encoder's distribution: [B, 3, H, W] in [0, 1] → [B, h, w].

        Stage 2's bound asks for this; with little data it regularizes (paper §2.2, footnote 2).
        """
        logits = self.logits(images)
        return gumbel_noise(logits, generator).add_(logits).argmax(-1)  # the Gumbel-max trick

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to images: [B, h, w] → [B, 3, H, W] in [0, 1]."""
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(
                f"codes are {codes.dtype} {tuple(codes.shape)}, expected integers [B, h, w]"
            )
        return reconstruction(self.decoder(codes))

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the parameters and config to `directory`/dvae.safetensors, rounded to `dtype`."""
        return save_weights(self, Path(directory) / FILE_NAME, dtype, kind="dvae")

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
    ) -> DVAE:
        """Load what `save` or a training wrote; ValueError where the file is missing or damaged.

        Args:
            directory: the folder, or the file itself.
            image_size: side of its images, if other than in training; the parameters fit any size.
        """
        path = Path(directory)
        path = path if path.is_file() else model_folder(path) / FILE_NAME
        model = load_weights(cls, DVAEConfig, path, device)
        if image_size is not None:
            model.config = replace(model.config, image_size=image_size)
        return model


def reconstruction(stats: Tensor) -> Tensor:
    """Return the image of the likelihood's parameters: φ⁻¹(sigmoid(μ)), b ignored (A.3)."""
    return unsqueeze_pixels(stats[:, :3].sigmoid())
