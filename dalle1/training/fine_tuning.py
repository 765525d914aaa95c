"""Fine-tuning of a part of a transformer's parameters: LoRA, or those that patterns select."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from dalle1.model.lora import add_lora, plain_name
from dalle1.model.transformer import Transformer
from dalle1.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(TrainConfig):
    """Settings of a training that may start from another model."""

    init: Path | None = None
    """Folder of a model to fine-tune; its vocabulary is kept, and its architecture replaces that of
    the preset. With rotary positions, its images may be of another size, and its captions
    longer."""
    lora: int | None = None
    """Rank of LoRA: train low-rank updates of all attentions and MLPs, and freeze the parameters of
    --init, whose architecture replaces the preset's. The updates are merged in the model that is
    saved for use."""
    lora_alpha: float | None = None
    """Scale of LoRA's updates, which are multiplied by alpha / rank. None: the rank."""
    train_only: tuple[str, ...] = ()
    """Patterns of the names of parameters to train, such as image_head or layers.*.mlp; all others
    are frozen, except LoRA's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lora(self.lora, self.lora_alpha)
        if self.lora is not None and self.init is None:
            raise ValueError(
                "lora freezes a model that is trained already, and --init names none; use --init "
                "FOLDER, or remove --lora"
            )
        if (self.lora is not None or self.train_only) and self.uses_deepspeed:
            raise ValueError(
                "--lora and --train-only freeze parameters, which --zero 1, 2, 3 and --deepspeed "
                "do not support; remove one of them"
            )


def check_lora(rank: int | None, alpha: float | None) -> None:
    """Raise a ValueError for a rank or a scale that LoRA cannot have."""
    if rank is not None and rank < 1:
        raise ValueError(f"lora is {rank}, expected a rank of at least 1")
    if alpha is not None and rank is None:
        raise ValueError("lora_alpha scales the updates of --lora; use --lora RANK, or remove it")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha is {alpha}, expected a number above 0")


def prepare_fine_tuning(model: Transformer, config: FineTuneConfig) -> Transformer:
    """Add LoRA and freeze what is not trained, in place; without either, all is trained.

    Raises: ValueError where a pattern matches no parameter.
    """
    freeze(model, config.lora, config.lora_alpha, config.train_only)
    return model


def freeze(
    model: Transformer, lora: int | None, alpha: float | None, train_only: Sequence[str]
) -> None:
    """Add LoRA and freeze what is not trained; see `prepare_fine_tuning`."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in train_only:
        if not any(matches(name, [pattern]) for name in names):
            modules = {name.rpartition(".")[0] for name in names} | {""}
            near = get_close_matches(pattern, sorted({*names, *modules}), 3, 0.5)
            such_as = ", ".join(near or ("image_head", "layers.*.mlp"))
            raise ValueError(
                f"train_only is {pattern!r}, expected a pattern that matches the name of a "
                f"parameter; use one such as {such_as}"
            )
    if lora is not None:
        add_lora(model.layers, lora, lora if alpha is None else alpha)
    if lora is not None or train_only:
        for name, p in model.named_parameters():
            plain = plain_name(name)
            p.requires_grad_(plain is None or matches(plain, train_only))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches a parameter's name, or that of a module that holds it."""
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)


def count(model: nn.Module, trained: bool = False) -> int:
    """Count a model's parameters, or those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def training_flops(model: Transformer) -> float:
    """Count the floating-point operations of one sample's forward and backward pass.

    The gradients of inputs take as many as the forward pass; so do those of weights, if all are
    trained.
    """
    total = count(model)  # 0 where ZeRO-3 holds the parameters: it freezes none
    frozen = total - count(model, trained=True)
    return model.flops() * (3 - frozen / max(total, 1))
