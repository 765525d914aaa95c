"""Key/value caches of decoding: the caption once, and the codes that masks still show.

P prompts, C candidates of each, H heads, L text positions, N = W² codes, S slots,
d width of a head.

All candidates of a prompt are at the same position of their streams. So they take the dimension of
positions in attention, [P, H, C, d], and their scores on the caption are one matrix product.
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


class SlotView(NamedTuple):
    """The slot of a code in a layer's cache, and the slots that it sees."""

    slot: Tensor
    """[1]: the code's own slot."""
    group: Tensor
    """[1]: the group whose slots it attends to."""
    hidden: Tensor
    """[1, S]: 0 for a visible slot of the group, −∞ for a hidden one."""


class SlotLayout:
    """The slots of one kind of layer, read off its mask.

    A column layer keeps one group of W slots for each column. All others keep a ring of as many
    slots as the mask reaches back: W + 1 for row, 5W + 6 for conv, N for full.
    """

    def __init__(self, kind: MaskKind, grid_size: int, conv_wrap: bool, like: Tensor) -> None:
        mask = image_mask(kind, grid_size, conv_wrap)
        positions = torch.arange(grid_size**2)
        reach = int((positions - mask.int().argmax(1)).max()) + 1
        self.groups, self.size = (grid_size, grid_size) if kind == "column" else (1, reach)
        group, order = positions % self.groups, positions // self.groups
        # The code in each slot of the group, by its order there; negative: none yet.
        held = order[:, None] - (order[:, None] - torch.arange(self.size)) % self.size
        seen = mask.gather(1, (held.clamp_min(0) * self.groups + group[:, None])) & (held >= 0)
        self.slot = (group * self.size + order % self.size).to(like.device)
        self.group = group.to(like.device)
        self.hidden = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(like)

    def at(self, position: Tensor) -> SlotView:
        """Look up a position [1]."""
        return SlotView(
            *(x.index_select(0, position) for x in (self.slot, self.group, self.hidden))
        )


class Cache:
    """The keys and values of one layer."""

    view: SlotView
    """Slots of the next step."""

    def __init__(
        self, mask: MaskedAttention, layout: SlotLayout, sizes: Sequence[int], like: Tensor
    ) -> None:
        """Allocate for sizes (P, H, C, d), in the precision and on the device of `like`."""
        self.mask, self.layout = mask, layout
        prompts, heads, candidates, width = sizes
        self.text = like.new_zeros(2, prompts, heads, mask.layout.text_len, width)
        slots = layout.groups, layout.size
        self.codes = like.new_zeros(2, prompts, heads, candidates, *slots, width)
        self.scores = like.new_zeros(prompts, heads, candidates, mask.layout.text_len + layout.size)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read captions, and codes that all candidates share: [P, H, n, d] each → [P, H, n, d]."""
        length, end = self.text.shape[-2], q.shape[2]
        kept = torch.arange(max(length, end - self.layout.groups * self.layout.size), end)
        slots = self.layout.slot[kept - length]
        for text, codes, x in zip(self.text, self.codes, (k, v), strict=True):
            text.copy_(x[:, :, :length])
            codes.flatten(3, 4)[:, :, :, slots] = x[:, :, None, kept]
        seen = self.mask.dense[:end, :end]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read one code of every candidate, at `view`: [P, H, C, d] each → [P, H, C, d]."""
        slot, group, hidden = self.view
        for codes, x in zip(self.codes, (k, v), strict=True):
            write_slot(codes.flatten(3, 4), slot, x)
        keys, values = (
            self.codes.index_select(4, group).squeeze(4)
            if self.layout.groups > 1
            else self.codes.squeeze(4)
        )
        (text_keys, text_values), length = self.text, self.text.shape[-2]
        q = q * (1 / math.sqrt(q.shape[-1]))  # faster on a CPU than a division
        text_scores, code_scores = self.scores.split([length, self.layout.size], dim=-1)
        text_scores.copy_(q @ text_keys.transpose(-1, -2))
        torch.add((q.unsqueeze(-2) @ keys.transpose(-1, -2)).squeeze(-2), hidden, out=code_scores)
        text_scores, code_scores = self.scores.softmax(-1).split([length, self.layout.size], dim=-1)
        return text_scores @ text_values + (code_scores.unsqueeze(-2) @ values).squeeze(-2)


def write_slot(store: Tensor, slot: Tensor, x: Tensor) -> None:
    """Write x [P, H, C, d] to a slot [1] of [P, H, C, S, d].

    A GPU reads the index from its own memory, without a wait; on a CPU a plain copy is faster.
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
        self.layouts = {
            kind: SlotLayout(kind, config.grid_size, config.conv_wrap, like)
            for kind in set(self.kinds)
        }
        sizes = prompts, config.heads, candidates, config.head_size
        self.layers = [
            Cache(cast(MaskedAttention, model.masks[kind]), self.layouts[kind], sizes, like)
            for kind in self.kinds
        ]
        self.prefill = [layer.prefill for layer in self.layers]
        self.step = [layer.step for layer in self.layers]

    def seek(self, position: Tensor) -> None:
        """Set the position [1] of the codes that the next step reads."""
        views = {kind: layout.at(position) for kind, layout in self.layouts.items()}
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            layer.view = views[kind]


def decode_memory(model: Transformer) -> tuple[int, int]:
    """Return the bytes that decoding needs for one more prompt, and for one more candidate of it.

    A prompt needs its keys, its values and the peak of prefill; a candidate needs its caches and
    its scores.
    """
    config, like = model.config, model.text_embedding.weight
    layouts = {k: SlotLayout(k, config.grid_size, config.conv_wrap, like) for k in set(model.kinds)}
    numbers = sum(
        2 * config.width * layouts[kind].groups * layouts[kind].size
        + config.heads * (config.text_len + layouts[kind].size)
        for kind in model.kinds
    )
    # Logits: as computed, in fp32, divided, filtered, and their sums in fp64; with some margin.
    candidate = numbers * like.element_size() + 64 * config.codebook_size
    # Completing an image reads up to T positions, each with 16 vectors of the width at once.
    reading = 16 * config.length * config.width + config.heads * config.length**2
    text = 2 * config.depth * config.text_len * config.width
    return (text + reading) * like.element_size(), candidate
