"""Contrastive losses: each image of a batch must match its own caption, and no other.

Two losses over all pairs of a batch: the symmetric InfoNCE of CLIP (Radford et al. 2021, §2.3) and
SigLIP's sigmoid of every single pair (Zhai et al. 2023, arXiv 2303.15343). Where a batch is
distributed over processes, `gather` collects the embeddings, so that the batch is compared as one.

Legend: B pairs, D width of the shared space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Kind = Literal["infonce", "sigmoid"]

MAX_LOG_SCALE = math.log(100.0)  # Radford et al. 2021, §2.5
BIAS = "logit_bias"  # of the sigmoid loss
SIGMOID_START = (math.log(10.0), -10.0)  # Zhai et al. 2023, §3.2: log of the scale, and the bias


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """The loss of a batch of pairs."""

    total: Tensor  # [] nats a pair: averaged over images and captions, or summed over partners
    accuracy: Tensor  # [] share of images and captions whose partner is the nearest, no gradient


@dataclass(frozen=True, kw_only=True)
class HardTexts:
    """Embedded hard negatives, one for each pair; see `dalle1.clip.hard_negatives`."""

    embeds: Tensor  # [B, D]
    exists: Tensor  # [B], bool: pairs without one hold any embedding

    def logits(self, image_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Return the scaled cosine of each image and its own hard negative: [B]."""
        with torch.autocast(image_embeds.device.type, enabled=False):
            return logit_scale * (image_embeds.float() * self.embeds.float()).sum(-1)


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    hard: HardTexts | None = None,
) -> ContrastiveLoss:
    """Compute the symmetric InfoNCE loss of `[B, D]` unit-length pairs, averaged over the batch.

    `logit_scale` is the factor on the cosines (CLIP keeps its logarithm as a parameter). A hard
    negative is one more caption that its image must not choose.
    """
    logits = _logits(image_embeds, text_embeds, logit_scale)
    pairs = torch.arange(len(logits), device=logits.device)
    choices = logits
    if hard is not None:
        wrong = hard.logits(image_embeds, logit_scale).masked_fill(~hard.exists, -torch.inf)
        choices = torch.cat([logits, wrong[:, None]], dim=1)
    total = (F.cross_entropy(choices, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    return ContrastiveLoss(total=total, accuracy=_accuracy(logits))


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    hard: HardTexts | None = None,
) -> ContrastiveLoss:
    """Compute SigLIP's loss of `[B, D]` unit-length pairs: does the caption belong to the image?

    Summed over all B² combinations, and the hard negatives, and divided by B, as in the paper's
    algorithm 1.
    """
    logits = _logits(image_embeds, text_embeds, logit_scale) + logit_bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    total = -F.logsigmoid(signs * logits).sum() / len(logits)
    if hard is not None:
        wrong = hard.logits(image_embeds, logit_scale) + logit_bias
        total = total - (F.logsigmoid(-wrong) * hard.exists).sum() / len(logits)
    return ContrastiveLoss(total=total, accuracy=_accuracy(logits))


def _logits(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float) -> Tensor:
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        shapes = f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}"
        raise ValueError(f"embeddings have shapes {shapes}: expected the same [B, D] twice")
    with torch.autocast(image_embeds.device.type, enabled=False):  # bf16 is too coarse at ×100
        return logit_scale * image_embeds.float() @ text_embeds.float().T  # [B image, B text]


def _accuracy(logits: Tensor) -> Tensor:
    pairs = torch.arange(len(logits), device=logits.device)
    hits = torch.cat([side.argmax(dim=1) == pairs for side in (logits, logits.T)])
    return hits.float().mean()


def pair_loss(
    model: nn.Module,
    pixels: Tensor,
    input_ids: Tensor,
    *,
    hard_ids: Tensor | None = None,
    kind: Kind = "infonce",
    at_once: int | None = None,
    gather: Callable[[Tensor], Tensor] = lambda x: x,
) -> ContrastiveLoss:
    """Compute the loss of a CLIP, as `prepare_for` left it, on a batch of pairs.

    Args:
        pixels: [B, 3, H, W], normalized for the model.
        input_ids: [B, T], from `Clip.tokenize`. Padding comes last, so that causal text needs no
            attention mask.
        hard_ids: [B, T], hard negatives; equal to `input_ids` where a caption has none.
        at_once: how many images or captions have activations in memory at a time; see `in_parts`.
        gather: local embeddings [B, D] → those of all processes, with gradients to all.
    """
    towers: Any = model  # the methods below are what all of transformers' CLIPs have
    images = gather(in_parts(towers.get_image_features, pixels, at_once, model))
    texts = gather(in_parts(towers.get_text_features, input_ids, at_once, model))
    hard = None
    if hard_ids is not None:
        embeds = gather(in_parts(towers.get_text_features, hard_ids, at_once, model))
        exists = gather((hard_ids != input_ids).any(1).float()).bool()
        hard = HardTexts(embeds=embeds, exists=exists)
    scale = limited(model.logit_scale).exp()  # type: ignore[arg-type]
    if kind == "infonce":
        return contrastive_loss(images, texts, scale, hard)
    return sigmoid_loss(images, texts, scale, model.logit_bias, hard)  # type: ignore[arg-type]


def prepare_for(model: nn.Module, kind: Kind) -> None:
    """Set the initial scale and bias of the sigmoid loss, or remove the bias for InfoNCE.

    A model that has a bias was trained with the sigmoid loss, and keeps scale and bias. InfoNCE
    removes a bias, which would be a parameter without a gradient.
    """
    if kind == "infonce" and hasattr(model, BIAS):
        delattr(model, BIAS)
        config = getattr(model, "config", None)
        if hasattr(config, BIAS):
            delattr(config, BIAS)
    if kind == "sigmoid" and not hasattr(model, BIAS):
        scale, bias = SIGMOID_START
        model.logit_bias = nn.Parameter(torch.tensor(bias))
        model.logit_scale.data.fill_(scale)  # type: ignore[union-attr, operator]


def limited(log_scale: Tensor) -> Tensor:
    """Limit the learned scale to 100; beyond, its gradient can only reduce it.

    OpenAI clips the parameter after each step; here the loss does it.
    """
    clipped = log_scale + (log_scale.clamp(max=MAX_LOG_SCALE) - log_scale).detach()
    if clipped.requires_grad:
        beyond = log_scale.detach() > MAX_LOG_SCALE
        clipped.register_hook(lambda g: torch.where(beyond, g.clamp(min=0), g))
    return clipped


def unit_features(output: Any) -> Tensor:
    """Return the features of `get_text_features` or `get_image_features`, at unit length."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1)


def in_parts(
    tower: Callable[[Tensor], Any], inputs: Tensor, at_once: int | None, model: nn.Module
) -> Tensor:
    """Encode `inputs` [B, …] to unit length [B, D], with activations of only `at_once` in memory.

    Gradient caching (Gao et al. 2021, arXiv 2101.06983): all inputs are encoded and compared, then
    each part is encoded again for its gradient. Loss and gradient are the same, at a third more
    computation. Only BatchNorm differs: it normalizes each part instead of the whole batch.
    """

    def encode(part: Tensor) -> Tensor:
        return unit_features(tower(part))

    if at_once is None or len(inputs) <= at_once:
        return encode(inputs)
    again = partial(_recompute_contexts, model)
    parts = [
        checkpoint(encode, part, use_reentrant=False, context_fn=again)
        for part in inputs.split(at_once)
    ]
    return torch.cat(parts)


def _recompute_contexts(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _frozen_statistics(model)


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm from counting the same images twice."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before):
            norm.momentum = momentum
