"""Write and read a diffusion prior as FOLDER/prior: diffusers' PriorTransformer.

The two read the same sequence. Theirs scales no embedding: its stored `clip_std` leads from what it
predicts to z_i, so it is 1 / scale, and z_t's matrix is multiplied by the scale. karlo's own has
learned positions and other statistics: a prior with `text_len`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dalle1.json_files import parse_json
from dalle1.storage import write_atomic
from dalle2.exchange.parts import (
    build,
    fill,
    one_architecture,
    read_part,
    refuse,
    refuse_values,
    to_ours,
    to_theirs,
    write_part,
)
from dalle2.prior import LAST, PIXEL_STD, DiffusionPrior, PriorConfig

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
ERRORS = "errors.json"
"""File of the errors that sampling adds as noise, which diffusers does not know."""
USUAL = {
    "added_emb_type": "prd",
    "encoder_hid_proj_type": "linear",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "time_embed_act_fn": "silu",
}
SCALED = "embedding_proj.weight"
MORE = {"positions": "positional_embedding", "mean": "clip_mean", "std": "clip_std"}


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
            ("text_len", c.text_len in (0, text_len), f"0 or {text_len}"),
        ],
    )
    theirs = to_theirs(state, names(c.depth))
    theirs[SCALED] = theirs[SCALED] * model.scale
    theirs["prd_embedding"] = state["query"].view(1, 1, -1)
    more = {
        "positions": torch.zeros(text_len + LAST, c.width),
        "mean": torch.zeros(c.embedding_width),
        "std": torch.full((c.embedding_width,), 1 / model.scale),
    }
    theirs |= {name: state.get(own, more[own])[None] for own, name in MORE.items()}
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
    write_atomic(Path(folder) / "prior" / ERRORS, json.dumps(c.errors) + "\n")


def read_prior(
    folder: str | Path, clip: str = "", length: float = 1.0, **known: Any
) -> DiffusionPrior:
    """Read a prior that `write_prior` or diffusers wrote, in eval mode.

    Args:
        clip: digest of the CLIP that it was trained with.
        length: length of the z_t that it was trained on.
        known: `schedule` and `times`, which a scheduler's folder holds.

    Raises: ValueError where it is missing, damaged or of another architecture.
    """
    path = Path(folder) / "prior"
    config, theirs = read_part(path)
    refuse_values(path, config, USUAL)
    own = path / ERRORS
    errors = parse_json(own, list) if own.is_file() else []
    with one_architecture(path):
        heads, width = config["num_attention_heads"], config["embedding_dim"]
        sizes = PriorConfig(
            width=heads * config["attention_head_dim"],
            depth=config["num_layers"],
            heads=heads,
            mlp="gelu-erf",
            qk_norm=False,
            embedding_width=width,
            text_width=width,
            clip=clip,
            errors=tuple(errors),
            **known,
        )
        scale = PIXEL_STD * math.sqrt(width)
        more = {name: theirs[other][0] for name, other in MORE.items()}
        usual_std = more["std"].allclose(torch.full((width,), 1 / scale))
        if more["positions"].any() or more["mean"].any() or not usual_std:
            sizes = replace(sizes, text_len=config["num_embeddings"])
        else:
            more = {}
        model = build(DiffusionPrior, sizes, theirs)
        others = *MORE.values(), "prd_embedding", "causal_attention_mask"
        state = to_ours(theirs, names(config["num_layers"]), others)
        name = "text_embedding.weight"
        state[name] = state[name] * length / scale
        state["query"] = theirs["prd_embedding"].flatten()
        return fill(model, state | more)
