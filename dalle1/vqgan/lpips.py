"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): a distance of images in the features of VGG16.

B batch, H W image in pixels, C channels of a layer. VQGAN's perceptual loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Convolutions of VGG16 by their index in torchvision; each stage ends in a max pooling."""
NAMES = tuple(f"features.{i}.{kind}" for s in STAGES for i in s for kind in ("weight", "bias"))
"""Names of the parameters of VGG16 in torchvision."""
LINEAR = tuple(f"lin{i}.model.1.weight" for i in range(len(STAGES)))
"""Names of the weights of each stage's channels in the package lpips, [1, C, 1, 1] each."""
MIN_SIZE = 16
"""Least side of an image in pixels: four poolings halve it."""


class LPIPS(nn.Module):
    """Weighted distances of normalized features after each stage; nothing in it is trained."""

    mean: Tensor
    std: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors called `NAMES` and `LINEAR`."""
        super().__init__()
        for name in (*NAMES, *LINEAR):
            self.register_buffer(name.replace(".", "_"), tensors[name].float())
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the mean distance of images [B, 3, H, W] in [0, 1] from others; a scalar."""
        with torch.autocast(images.device.type, enabled=False):  # fp16 would overflow in squares
            return self._distance(images, others)

    def _distance(self, images: Tensor, others: Tensor) -> Tensor:
        x = (2 * torch.cat([images, others]).float() - 1 - self.mean) / self.std
        total = x.new_zeros(())
        for i, stage in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if i else x
            for index in stage:
                weight, bias = (
                    self.get_buffer(f"features_{index}_{kind}") for kind in ("weight", "bias")
                )
                x = F.conv2d(x, weight, bias, padding=1).relu()
            # The epsilon within keeps the gradient of features that are all 0 finite.
            norm = (x.square().sum(1, keepdim=True) + 1e-20).sqrt()
            one, other = (x / (norm + 1e-10)).chunk(2)
            weight = self.get_buffer(f"lin{i}_model_1_weight")
            total = total + F.conv2d((one - other).square(), weight).mean()
        return total
