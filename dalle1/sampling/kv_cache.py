"""What a layer remembers while codes are drawn: the caption once, and the codes still in sight.

P prompts, C candidates of each, H heads, L text places, N = W² codes, S slots, d width of a head.

All candidates of a prompt stand at the same place of their streams. So they are to attention what
places are elsewhere, [P, H, C, d], and their scores against the caption are one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.model.attention import MaskedAttention
from dalle1.model.masks import MaskKind, image_mask
from dalle1.model.transformer import Transformer


class Spot(NamedTuple):
    """Where a code stands in a layer's cache, and what it sees there."""

    slot: Tensor
    """[1]: its own."""
    group: Tensor
    """[1]: the group whose slots it looks at."""
    unseen: Tensor
    """[1, S]: 0 for a slot of the group that it sees, −∞ for one that it does not."""


class Window:
    """The slots of one kind of layer, read off its mask.

    A column layer keeps one group of W slots for each column. All others keep a ring of as many
    slots as the mask reaches back: W + 1 for row, 5W + 6 for conv, N for full.
    """

    def __init__(self, kind: MaskKind, grid_size: int, conv_wrap: bool, like: Tensor) -> None:
        mask = image_mask(kind, grid_size, conv_wrap)
        places = torch.arange(grid_size**2)
        reach = int((places - mask.int().argmax(1)).max()) + 1
        self.groups, self.size = (grid_size, grid_size) if kind == "column" else (1, reach)
        group, order = places % self.groups, places // self.groups
        # Which code a slot of the group holds, by its order there; negative: none as yet.
        held = order[:, None] - (order[:, None] - torch.arange(self.size)) % self.size
        seen = mask.gather(1, (held.clamp_min(0) * self.groups + group[:, None])) & (held >= 0)
        self.slot = (group * self.size + order % self.size).to(like.device)
        self.group = group.to(like.device)
        self.unseen = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(like)

    def at(self, place: Tensor) -> Spot:
        """Look up a place [1]."""
        return Spot(*(x.index_select(0, place) for x in (self.slot, self.group, self.unseen)))


class Cache:
    """The keys and values of one layer."""

    spot: Spot
    """Where the next step stands."""

    def __init__(
        self, mask: MaskedAttention, window: Window, sizes: Sequence[int], like: Tensor
    ) -> None:
        """Make room for sizes (P, H, C, d), in the precision and on the device of `like`."""
        self.mask, self.window = mask, window
        prompts, heads, candidates, width = sizes
        self.text = like.new_zeros(2, prompts, heads, mask.layout.text_len, width)
        slots = window.groups, window.size
        self.codes = like.new_zeros(2, prompts, heads, candidates, *slots, width)
        self.scores = like.new_zeros(prompts, heads, candidates, mask.layout.text_len + window.size)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read captions, and codes that all candidates share: [P, H, n, d] each → [P, H, n, d]."""
        length, end = self.text.shape[-2], q.shape[2]
        kept = torch.arange(max(length, end - self.window.groups * self.window.size), end)
        slots = self.window.slot[kept - length]
        for text, codes, x in zip(self.text, self.codes, (k, v), strict=True):
            text.copy_(x[:, :, :length])
            codes.flatten(3, 4)[:, :, :, slots] = x[:, :, None, kept]
        seen = self.mask.dense[:end, :end]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read one code of every candidate, at `spot`: [P, H, C, d] each → [P, H, C, d]."""
        slot, group, unseen = self.spot
        for codes, x in zip(self.codes, (k, v), strict=True):
            _put(codes.flatten(3, 4), slot, x)
        keys, values = (
            self.codes.index_select(4, group).squeeze(4)
            if self.window.groups > 1
            else self.codes.squeeze(4)
        )
        (text_keys, text_values), length = self.text, self.text.shape[-2]
        q = q * (1 / math.sqrt(q.shape[-1]))  # on a CPU, sooner done than a division
        of_text, of_codes = self.scores.split([length, self.window.size], dim=-1)
        of_text.copy_(q @ text_keys.transpose(-1, -2))
        torch.add((q.unsqueeze(-2) @ keys.transpose(-1, -2)).squeeze(-2), unseen, out=of_codes)
        of_text, of_codes = self.scores.softmax(-1).split([length, self.window.size], dim=-1)
        return of_text @ text_values + (of_codes.unsqueeze(-2) @ values).squeeze(-2)


def _put(store: Tensor, slot: Tensor, x: Tensor) -> None:
    """Write x [P, H, C, d] to a slot [1] of [P, H, C, S, d].

    A GPU reads the number itself, so that it need not wait; elsewhere a plain copy is faster.
    """
    if store.device.type == "cpu":
        store.select(3, int(slot)).copy_(x)
    else:
        store.index_copy_(3, slot, x.unsqueeze(3))


class Caches:
    """The caches of all layers of a model, for P prompts with C candidates each."""

    def __init__(self, model: Transformer, prompts: int, candidates: int) -> None:
        config, like = model.config, model.text_embedding.weight
        self.kinds = model.kinds
        self.windows = {
            kind: Window(kind, config.grid_size, config.conv_wrap, like) for kind in set(self.kinds)
        }
        sizes = prompts, config.heads, candidates, config.head_width
        self.layers = [
            Cache(cast(MaskedAttention, model.masks[kind]), self.windows[kind], sizes, like)
            for kind in self.kinds
        ]
        self.prefill = [layer.prefill for layer in self.layers]
        self.step = [layer.step for layer in self.layers]

    def go_to(self, place: Tensor) -> None:
        """Have the next step read the codes at place [1]."""
        spots = {kind: window.at(place) for kind, window in self.windows.items()}
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            layer.spot = spots[kind]


def decode_memory(model: Transformer) -> tuple[int, int]:
    """Count what drawing takes: the bytes of one more prompt, and of one more candidate of it.

    A prompt's are its keys, its values, and what reading it takes at the most; a candidate's are
    its caches, and its scores while it draws.
    """
    config, like = model.config, model.text_embedding.weight
    windows = {k: Window(k, config.grid_size, config.conv_wrap, like) for k in set(model.kinds)}
    numbers = sum(
        2 * config.width * windows[kind].groups * windows[kind].size
        + config.heads * (config.text_len + windows[kind].size)
        for kind in model.kinds
    )
    # Logits as they are, in fp32, divided, restricted, and their sums in fp64; with some to spare.
    candidate = numbers * like.element_size() + 64 * config.codebook_size
    # Completing a picture reads up to T places: 16 widths of each are in use at once.
    reading = 16 * config.length * config.width + config.heads * config.length**2
    text = 2 * config.depth * config.text_len * config.width
    return (text + reading) * like.element_size(), candidate
