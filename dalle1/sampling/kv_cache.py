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
    """Slots of codes in a layer's cache, and the slots that they see.

    One position that all candidates share, [1], or windows of n positions of each, [P, C, n].
    """

    slot: Tensor
    """[1] or [P, C, n]: the code's own slot."""
    group: Tensor
    """[1] or [P, C, n]: the group whose slots it attends to."""
    hidden: Tensor
    """[1, S] or [P, C, n, S]: 0 for a visible slot of the group, −∞ for a hidden one."""


class SlotLayout:
    """The slots of one kind of layer, read off its mask.

    A column layer keeps one group of W slots for each column. All others keep a ring of as many
    slots as the mask reaches back: W + 1 for row, 5W + 6 for conv, N for full. For windows of n
    codes it has n − 1 more: no code of a window overwrites what an earlier one of it sees.
    """

    def __init__(
        self, kind: MaskKind, grid_size: int, conv_wrap: bool, like: Tensor, window: int = 1
    ) -> None:
        mask = image_mask(kind, grid_size, conv_wrap)
        positions = torch.arange(grid_size**2)
        reach = int((positions - mask.int().argmax(1)).max()) + 1
        ring = min(reach + window - 1, grid_size**2)
        self.groups, self.size = (grid_size, grid_size) if kind == "column" else (1, ring)
        group, order = positions % self.groups, positions // self.groups
        # The code in each slot of the group, by its order there; negative: none yet.
        held = order[:, None] - (order[:, None] - torch.arange(self.size)) % self.size
        seen = mask.gather(1, (held.clamp_min(0) * self.groups + group[:, None])) & (held >= 0)
        self.slot = (group * self.size + order % self.size).to(like.device)
        self.group = group.to(like.device)
        self.hidden = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(like)

    def at(self, position: Tensor) -> SlotView:
        """Look up a position [1], or those of windows [P, C, n]."""
        return SlotView(self.slot[position], self.group[position], self.hidden[position])


class Cache:
    """The keys and values of one layer."""

    view: SlotView
    """Slots of the next step."""
    flat_slots: Tensor
    flat_groups: Tensor
    """[P·H·C·n]: slots and groups of the next windows, counted over all candidates and heads."""

    def __init__(
        self, mask: MaskedAttention, layout: SlotLayout, sizes: Sequence[int], like: Tensor
    ) -> None:
        """Allocate for sizes (P, H, C, n, d), in the precision and on the device of `like`."""
        self.mask, self.layout = mask, layout
        prompts, heads, candidates, window, width = sizes
        length, slots = mask.layout.text_len, (layout.groups, layout.size)
        self.text = like.new_zeros(2, prompts, heads, length, width)
        self.codes = like.new_zeros(2, prompts, heads, candidates, *slots, width)
        rows = candidates * window
        self.scores = like.new_zeros(prompts, heads, rows, length + layout.size)
        self.window, self.scale = window, 1 / math.sqrt(width)
        self.zero = like.new_zeros(())
        # Views of these, made once: making one takes as long as a small operation.
        self.text_keys, self.text_values = self.text.flatten(1, 2)
        self.text_keys = self.text_keys.transpose(1, 2)
        self.is_strided = like.device.type == "cpu" and like.dtype != torch.bfloat16

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
        """Read codes of every candidate, at `view`: [P, H, C·n, d] each → [P, H, C·n, d]."""
        q, hidden = q.contiguous(), self.view.hidden
        is_window = hidden.ndim > 2
        keys, values = self.read_window(k, v) if is_window else self.read_shared(k, v)
        flat = q.flatten(0, 1)
        # [P·H·C, n, d] against the slots of a candidate, or [P·H·C·n, 1, d] against a group's.
        per_candidate = flat.view(len(keys), -1, q.shape[-1])
        text_scores = _scaled_product(flat, self.text_keys, self.scale, self.zero)
        code_scores = _scaled_product(
            per_candidate, keys.transpose(1, 2), self.scale, self.zero if is_window else hidden
        )

        code_scores = code_scores.view(*q.shape[:3], -1)
        if is_window:
            code_scores.add_(hidden.flatten(1, 2)[:, None])
        torch.cat([text_scores.view(*q.shape[:3], -1), code_scores], dim=-1, out=self.scores)
        of_text, of_codes = self.scores.softmax(-1).split(
            [self.text.shape[-2], keys.shape[1]], dim=-1
        )
        out = torch.bmm(of_text.flatten(0, 1), self.text_values)
        of_codes = of_codes.view(*per_candidate.shape[:2], -1)
        out.view(per_candidate.shape).baddbmm_(of_codes, values)
        return out.view(q.shape)

    def read_shared(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write to one slot of all candidates; return the keys and values [P·H·C, S, d] it sees."""
        for codes, x in zip(self.codes, (k, v), strict=True):
            write_slot(codes.flatten(3, 4), self.view.slot, x)
        if self.layout.groups == 1:
            keys, values = self.codes.squeeze(4).flatten(1, 3)
        elif self.is_strided:
            keys, values = self.codes.select(4, int(self.view.group)).flatten(1, 3)
        else:  # in bf16, oneDNN is nearly twice as slow on a strided view
            keys, values = self.codes.index_select(4, self.view.group).squeeze(4).flatten(1, 3)
        return keys, values

    def read_window(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write to each candidate's own slots; return what is seen, [P·H·C, S, d].

        For a column layer it is [P·H·C·n, S, d]: every code of a window sees another group.
        """
        for codes, x in zip(self.codes, (k, v), strict=True):
            codes.view(-1, codes.shape[-1]).index_copy_(
                0, self.flat_slots, x.reshape(-1, x.shape[-1])
            )
        if self.layout.groups == 1:
            keys, values = self.codes.squeeze(4).flatten(1, 3)
            return keys, values
        keys, values = (
            codes.flatten(0, 3).index_select(0, self.flat_groups) for codes in self.codes
        )
        return keys, values

    def continue_from(self, candidates: Tensor) -> None:
        """Copy the codes' keys and values of the candidates that others continue: [P, C]."""
        own = torch.arange(candidates.shape[1], device=candidates.device)
        for prompt, of_prompt in enumerate(candidates):
            moved = (of_prompt != own).nonzero()[:, 0]
            if len(moved):
                codes = self.codes[:, prompt]
                codes.index_copy_(2, moved, codes.index_select(2, of_prompt[moved]))


def _scaled_product(a: Tensor, b: Tensor, scale: float, added: Tensor) -> Tensor:
    """Compute a·b·scale + added in one operation, but not what is added where that is a scalar."""
    return torch.baddbmm(added, a, b, beta=added.ndim > 0, alpha=scale)


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

    def __init__(self, model: Transformer, prompts: int, candidates: int, window: int = 1) -> None:
        """Allocate caches for steps of one code, or of windows of n consecutive ones."""
        config, like = model.config, model.text_embedding.weight
        self.kinds = model.kinds
        self.layouts = {
            kind: SlotLayout(kind, config.grid_size, config.conv_wrap, like, window)
            for kind in set(self.kinds)
        }
        sizes = prompts, config.heads, candidates, window, config.head_size
        self.layers = [
            Cache(cast(MaskedAttention, model.masks[kind]), self.layouts[kind], sizes, like)
            for kind in self.kinds
        ]
        self.prefill = [layer.prefill for layer in self.layers]
        self.step = [layer.step for layer in self.layers]
        # The number of each [prompt, head, candidate], to count slots and groups over all.
        shape = prompts, config.heads, candidates
        self.numbers = torch.arange(math.prod(shape), device=like.device).view(*shape, 1)

    def seek(self, position: Tensor) -> None:
        """Set the position [1] of the codes that the next step reads, or windows of them [P, C, n].

        No window begins before the last one of its candidate did.
        """
        for kind, layout in self.layouts.items():
            view = layout.at(position)
            if position.ndim > 1:
                slots = self.numbers * (layout.groups * layout.size) + view.slot[:, None]
                groups = self.numbers * layout.groups + view.group[:, None]
                flat = slots.flatten(), groups.flatten()
            for of, layer in zip(self.kinds, self.layers, strict=True):
                if of == kind:
                    layer.view = view
                    if position.ndim > 1:
                        layer.flat_slots, layer.flat_groups = flat

    def continue_from(self, candidates: Tensor) -> None:
        """Let each candidate continue the codes of another, or its own: [P, C]."""
        for layer in self.layers:
            layer.continue_from(candidates)


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
