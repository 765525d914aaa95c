"""The modified ResNet, the image tower of CLIP's RN50 (Radford et al. 2021, §2.4, 2103.00020).

Differences from torchvision's ResNet: a stem of three 3×3 convolutions (ResNet-D, He et al. 2019),
average pooling over 2×2 instead of strides (anti-aliasing, Zhang 2019), and attention pooling whose
one query is the mean of all positions. The parameters have the names of OpenAI's release, so that
its state dicts, and open_clip's, load.

Legend: B images, C channels, H W positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

EXPANSION = 4  # output channels of a block, relative to its 3×3 convolution
REDUCTION = 32  # side in pixels that one position of the last grid covers
WIDENING = 8 * EXPANSION  # channels of the last stage, relative to those after the stem


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut; a stride is average pooling."""

    def __init__(self, c_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        c_out = EXPANSION * width
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shrink = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(c_in, c_out, 1, bias=False)),
                        ("1", nn.BatchNorm2d(c_out)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:  # [B, C_in, H, W] → [B, C_out, H/stride, W/stride]
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.shrink(y)))
        return F.relu(y + self.downsample(x))


class AttentionPool(nn.Module):
    """Attention from the mean of all positions to them and itself, then a projection."""

    def __init__(self, grid_size: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        initial = torch.empty(grid_size**2 + 1, width).normal_().div_(width**0.5)
        self.positional_embedding = nn.Parameter(initial)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] → [B, embed_dim]
        x = rearrange(x, "b c h w -> b (h w) c")
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)
        q, k, v = (
            rearrange(y, "b t (h d) -> b h t d", h=self.heads)
            for y in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        pooled = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(rearrange(pooled, "b h 1 d -> b (h d)"))


class ModifiedResNet(nn.Module):
    """Images [B, 3, image_size, image_size] to features [B, embed_dim].

    Args:
        layers: blocks in each of the four stages; RN50's are 3, 4, 6, 3.
        width: channels after the stem; the last stage has 32 times as many.
        heads: of the attention pooling.
    """

    def __init__(
        self, layers: Sequence[int], *, image_size: int, width: int, heads: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        c_in = width
        for i, depth in enumerate(layers):
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(c_in, width << i, stride=2 if i and not j else 1))
                c_in = EXPANSION * (width << i)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(image_size // REDUCTION, c_in, heads, embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the weights, as OpenAI's code does.

        | what | initial |
        |---|---|
        | convolutions | torch's default |
        | gain of each block's last normalization | 0: a block begins as its shortcut |
        | attention's projections | normal, standard deviation width^-½ |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
        for projection in ("q_proj", "k_proj", "v_proj", "c_proj"):
            linear = getattr(self.attnpool, projection)
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        width = self.attnpool.positional_embedding.shape[1]
        nn.init.normal_(self.attnpool.positional_embedding, std=width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(memory_format=torch.channels_last)  # many times faster on CPUs
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = self.avgpool(x)
        for i in (1, 2, 3, 4):
            x = getattr(self, f"layer{i}")(x)
        return self.attnpool(x)
