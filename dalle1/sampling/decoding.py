"""Drawing codes for captions: read each caption once, then draw many pictures of it code by code.

prefill → decode one code of every candidate → …

P prompts, C candidates of each, L text places, N = W² codes, V codebook size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.devices import recorded
from dalle1.model.transformer import Transformer
from dalle1.sampling.kv_cache import Caches
from dalle1.sampling.packed_linear import packed

MIN_TEMPERATURE = 1e-20
"""Below this temperature, which float32 could not divide by, the likeliest is taken."""
FREE = -1
"""Stands among codes that are given for one that is to be drawn."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn from their scores. The paper draws from all of them, as they are."""

    temperature: float = 1.0
    """Scores are divided by it: below 1 safer, above 1 wilder; 0 takes the likeliest."""
    top_k: int = 0
    """Only the k likeliest, and those that tie with the last of them; 0: all."""
    top_p: float = 1.0
    """Only the likeliest that make up this share of the probability, in (0, 1]."""
    typical: float = 1.0
    """Only those whose surprise is nearest to what is expected, up to this share, in (0, 1]."""
    guidance: float = 1.0
    """w in ∅ + w·(scores − ∅), where ∅ are the scores without a caption; 1: no guidance."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}, expected at least 0 (0: the likeliest)"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected at least 0 (0: all)")
        for name in ("top_p", "typical"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected above 0 and at most 1 (1: all)"
                )
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}, expected at least 0 (1: none)")


PAPER = Sampling()


def candidate_uniforms(seed: int, candidates: Sequence[int], length: int) -> Tensor:
    """Give each candidate its own random numbers in [0, 1): [C, length].

    They depend on (seed, candidate) alone, so candidate 7 is the same picture in any batch.
    """
    streams = [random.Random(f"{seed}/{c}") for c in candidates]
    return torch.tensor([[s.random() for _ in range(length)] for s in streams])


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set to −∞ what `sampling` leaves out: top_k first, of the rest typical, of that top_p.

    Args:
        logits: [B, V]; the likeliest, or the most typical, always stays.
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.typical < 1:
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1, True)
        logits = _keep_first(logits, -(log_p + entropy).abs(), sampling.typical)
    if sampling.top_p < 1:
        logits = _keep_first(logits, logits, sampling.top_p)
    return logits


def _keep_first(logits: Tensor, preference: Tensor, share: float) -> Tensor:
    """Keep the most preferred until they make up `share` of the probability."""
    order = preference.sort(descending=True, stable=True).indices
    p = logits.gather(-1, order).softmax(-1)
    drop = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= share)
    return logits.masked_fill(drop, -torch.inf)


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling = PAPER) -> Tensor:
    """Draw one token a row from softmax(logits / temperature), by inverting its distribution.

    Args:
        logits: [B, V].
        uniforms: [B], in [0, 1].
        sampling: its guidance plays no part here.

    Returns: [B].
    """
    logits = logits.float()
    if sampling.temperature < MIN_TEMPERATURE:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = filter_logits(logits, sampling).exp().cumsum(-1, dtype=exact)
    total = cumulative[:, -1:].contiguous()
    # A uniform that was rounded to 1 lies past all tokens; then it is the last that is possible.
    last = torch.searchsorted(cumulative, total)
    target = uniforms.to(cumulative)[:, None] * total
    return torch.searchsorted(cumulative, target, right=True).minimum(last)[:, 0]


class DecodeState:
    """Candidates of some captions, of which each call of `advance` draws the next code.

    Everything that it touches stays where it is, so that a GPU can record it once and replay it.
    """

    def __init__(
        self, model: Transformer, text: Tensor, uniforms: Tensor, sampling: Sampling, given: Tensor
    ) -> None:
        """Read the captions and what is given before the first free code, and draw that one."""
        self.sampling, self.given = sampling, given
        self.prompts, self.candidates = len(text), len(uniforms)
        self.model = model = packed(model, self.prompts * self.candidates)
        self.uniforms = uniforms.to(text.device)
        self.codes = given.repeat(self.prompts, self.candidates, 1)
        self.place = (given == FREE).nonzero()[:1, 0]
        if self.guided:
            text = torch.cat([text, null_caption(model, text.device).expand_as(text)])
        self.caches = Caches(model, len(text), self.candidates)
        # The code that is drawn first is among them, and is not read.
        codes = given[: int(self.place) + 1].expand(len(text), -1)
        states = model.run(model.embed(text, codes), self.caches.prefill)
        self._choose(states[:, -1:])

    @property
    def guided(self) -> bool:
        return self.sampling.guidance != 1

    def advance(self) -> None:
        """Read the codes drawn last, and draw the next."""
        last = self.codes.index_select(2, self.place)[:, :, 0]
        self.place.add_(1)
        self.caches.go_to(self.place)
        x = self.model.embed_codes(last.repeat(2, 1) if self.guided else last, self.place)
        places = self.model.config.text_len + self.place
        self._choose(self.model.run(x, self.caches.step, places))

    def _choose(self, states: Tensor) -> None:
        """Draw from states [P, C, D], or [P, 1, D] that all candidates share, at `place`."""
        logits = self.model.image_head(states).float()
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + self.sampling.guidance * (conditional - unconditional)
        logits = logits.expand(-1, self.candidates, -1)
        uniforms = self.uniforms.index_select(1, self.place)[:, 0].expand(self.prompts, -1)
        drawn = draw(logits.flatten(0, 1), uniforms.flatten(), self.sampling)
        given = self.given.index_select(0, self.place)
        drawn = torch.where(given == FREE, drawn, given).view(self.prompts, self.candidates, 1)
        self.codes.index_copy_(2, self.place, drawn)


@torch.inference_mode()
def generate(
    model: Transformer,
    text: Tensor,
    uniforms: Tensor,
    sampling: Sampling = PAPER,
    *,
    given: Tensor | None = None,
    on_row: Callable[[Tensor, int], None] | None = None,
) -> Tensor:
    """Draw codes for captions.

    Args:
        text: [P, L], captions with their padding.
        uniforms: [C, N]: the random number of each candidate at each code.
        given: [N], the codes that are given, and `FREE` where they are to be drawn; all are free
            if not given. Those before the first free one are read at once.
        on_row: called with the codes [P, C, N] and how many of their rows are there, after each.

    Returns: [P, C, W, W].
    """
    config = model.config
    _check_shapes(model, text, uniforms)
    given = _check_given(given, model).to(text.device)
    free, grid = (given == FREE).nonzero(), (config.grid_size, config.grid_size)
    if not len(free):
        return given.repeat(len(text), len(uniforms), 1).unflatten(2, grid)
    with torch.cuda.device(text.device) if text.is_cuda else nullcontext():
        drawing = DecodeState(model, text, uniforms, sampling, given)
        advance = recorded(drawing.advance) if text.is_cuda else drawing.advance
        first = int(free[0])
        for place in range(first, config.image_len):
            if place > first:
                advance()
            if on_row and (place + 1) % config.grid_size == 0:
                on_row(drawing.codes, (place + 1) // config.grid_size)
    return drawing.codes.unflatten(2, grid)


def _check_shapes(model: Transformer, text: Tensor, uniforms: Tensor) -> None:
    length, width = model.config.text_len, model.config.image_len
    most = model.text_embedding.num_embeddings - 2  # the last is the start token
    if text.ndim != 2 or text.shape[1] != length or not 0 <= text.min() <= text.max() <= most:
        raise ValueError(f"got text {tuple(text.shape)}, expected [P, {length}], 0 to {most}")
    if uniforms.ndim != 2 or uniforms.shape[1] != width:
        raise ValueError(f"got uniforms {tuple(uniforms.shape)}, expected [C, {width}]")


def _check_given(given: Tensor | None, model: Transformer) -> Tensor:
    length, vocab = model.config.image_len, model.config.codebook_size
    if given is None:
        return torch.full((length,), FREE)
    whole = not given.is_floating_point() and given.shape == (length,)
    if not whole or given.min() < FREE or given.max() >= vocab:
        raise ValueError(
            f"got given codes {tuple(given.shape)} of {given.dtype}, expected [{length}] whole "
            f"numbers, each from 0 to {vocab - 1}, or {FREE} where it is to be drawn"
        )
    return given.long()


def null_caption(model: Transformer, device: str | torch.device = "cpu") -> Tensor:
    """Give the caption that says nothing, [1, L]: padding throughout."""
    config = model.config
    return torch.arange(config.text_len, device=device)[None] + config.text_vocab


@torch.inference_mode()
def complete_text(
    model: Transformer, text: Tensor, uniforms: Tensor, sampling: Sampling = PAPER
) -> Tensor:
    """Continue the beginning of a caption: the model is one of captions, too.

    Args:
        text: [L], the beginning with its padding.
        uniforms: [C, L], the random number of each candidate at each place.
        sampling: without guidance.

    Returns: [C, L], each with its padding. Once padding is drawn, the caption is at its end; a
    model that never learned padding (`pad_targets`) finds no end before the last place.
    """
    if sampling.guidance != 1:
        raise ValueError(f"guidance is {sampling.guidance}; there is none for captions, expected 1")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    config = model.config
    text, padding = text.repeat(len(uniforms), 1), null_caption(model, text.device)[0]
    begun = int((text[0] < config.text_vocab).sum())
    ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for place in range(begun, config.text_len - 1):  # the last place is padding in any caption
        # Captions are short, and are read anew for each token.
        states = model.run(model.embed_text(text)[:, : place + 1], [attend] * config.depth)
        logits = model.text_head(states[:, -1]).float()
        allowed = torch.zeros_like(logits[0], dtype=torch.bool)
        allowed[: config.text_vocab] = True
        allowed[padding[place]] = config.pad_targets  # else it was never learned
        drawn = draw(
            logits.masked_fill(~allowed, -torch.inf), uniforms[:, place].to(text.device), sampling
        )
        text[:, place] = torch.where(ended, padding[place], drawn)
        ended |= drawn == padding[place]
    return text
