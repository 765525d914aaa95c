"""Write and read a diffusion prior as FOLDER/prior: diffusers' PriorTransformer.

The two read the same sequence. Theirs scales no embedding: its stored `clip_std` leads from what it
predicts to z_i, so it is 1 / scale, and z_t's matrix is multiplied by the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dalle2.exchange.parts import (
    other_architecture,
    read_part,
    refuse,
    to_ours,
    to_theirs,
    write_part,
)
from dalle2.prior import DiffusionPrior, PriorConfig

ENDS = {
    "text": "encoder_hidden_states_proj",
    "text_embedding": "embedding_proj",
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "noised": "proj_in",
    "norm": "norm_out",
    "head": "proj_to_clip_embeddings",
}
LAYER = {
    "attention.norm": ["norm1"],
    "attention.branch.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attention.branch.out": ["attn1.to_out.0"],
    "mlp.norm": ["norm3"],
    "mlp.branch.up": ["ff.net.0.proj"],
    "mlp.branch.down": ["ff.net.2"],
}
SCALED = "embedding_proj.weight"
LAST = 4
"""Positions after the caption: z_t, time, noised z_i, query."""


def names(depth: int) -> Iterator[tuple[str, list[str]]]:
    """Yield (ours, theirs) of all modules."""
    yield from ((ours, [theirs]) for ours, theirs in ENDS.items())
    for i in range(depth):
        for ours, theirs in LAYER.items():
            yield f"layers.{i}.{ours}", [f"transformer_blocks.{i}.{name}" for name in theirs]


def write_prior(model: DiffusionPrior, folder: str | Path, text_len: int) -> None:
    """Write a prior for captions of `text_len` tokens; ValueError where diffusers has no such.

    Padding has to be masked there, as here.
    """
    c, state = model.config, model.state_dict()
    refuse(
        c,
        [
            ("mlp", c.mlp == "gelu-erf", "gelu-erf"),
            ("qk_norm", not c.qk_norm, "False"),
            ("text_width", c.text_width == c.embedding_width, "that of the embeddings"),
        ],
    )
    theirs = to_theirs(state, names(c.depth))
    theirs[SCALED] = theirs[SCALED] * model.scale
    theirs["prd_embedding"] = state["query"].view(1, 1, -1)
    theirs["positional_embedding"] = torch.zeros(1, text_len + LAST, c.width)
    theirs["clip_mean"] = torch.zeros(1, c.embedding_width)
    theirs["clip_std"] = torch.full((1, c.embedding_width), 1 / model.scale)
    config = {
        "_class_name": "PriorTransformer",
        "num_attention_heads": c.heads,
        "attention_head_dim": c.width // c.heads,
        "num_layers": c.depth,
        "embedding_dim": c.embedding_width,
        "num_embeddings": text_len,
        "additional_embeddings": LAST,
        "added_emb_type": "prd",
    }
    write_part(Path(folder) / "prior", config, theirs)


def read_prior(folder: str | Path, clip: str = "") -> DiffusionPrior:
    """Read a prior that `write_prior` or diffusers wrote, in eval mode.

    Args:
        clip: digest of the CLIP that it was trained with.

    Raises: ValueError where it is missing, damaged, or has what ours have not: learned positions,
        or other statistics of embeddings, as karlo's own has.
    """
    path = Path(folder) / "prior"
    config, theirs = read_part(path)
    try:
        heads, size = config["num_attention_heads"], config["attention_head_dim"]
        model = DiffusionPrior(
            PriorConfig(
                width=heads * size,
                depth=config["num_layers"],
                heads=heads,
                mlp="gelu-erf",
                qk_norm=False,
                embedding_width=config["embedding_dim"],
                text_width=config["embedding_dim"],
                clip=clip,
            )
        )
        _refuse_more(path, theirs, model.scale)
        state: dict[str, Tensor] = to_ours(theirs, names(config["num_layers"]))
        state["text_embedding.weight"] = state["text_embedding.weight"] / model.scale
        state["query"] = theirs["prd_embedding"].flatten()
        model.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise other_architecture(path, error) from error
    return model.eval()


def _refuse_more(path: Path, theirs: dict[str, Tensor], scale: float) -> None:
    """Raise ValueError for what a prior of ours cannot hold."""
    std = theirs["clip_std"]
    if theirs["positional_embedding"].any():
        raise ValueError(f"{path} has learned positions, expected none; ours has no such inlet")
    if theirs["clip_mean"].any() or not std.allclose(torch.full_like(std, 1 / scale)):
        raise ValueError(
            f"{path} has other statistics of embeddings than mean 0 and std {1 / scale:.4g}"
        )
