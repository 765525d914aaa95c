"""Write and read a U-Net of Stable Diffusion's parts: diffusers' UNet2DConditionModel.

Its condition is StableUnCLIP's: a caption by cross-attention, and as class label z_i with the noise
level that was added to it, always 0 here. z_i is multiplied by √D here and not there, where it also
has its own length instead of 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle2.exchange.decoder import BLOCK, ENDS, stages
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
from dalle2.unet import UNet, UNetConfig

ATTENDS = {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}
PLAIN = {"down": "DownBlock2D", "up": "UpBlock2D"}
LAYER = {
    "self_norm": ["norm1"],
    "qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "self_out": ["attn1.to_out.0"],
    "cross_norm": ["norm2"],
    "query": ["attn2.to_q"],
    "context": ["attn2.to_k", "attn2.to_v"],
    "cross_out": ["attn2.to_out.0"],
    "mlp_norm": ["norm3"],
    "up": ["ff.net.0.proj"],
    "down": ["ff.net.2"],
}
AROUND = {"norm": "norm", "enter": "proj_in", "leave": "proj_out"}
LABELS = {f"embedding_mlp.{i}": f"class_embedding.linear_{n}" for i, n in ((0, 1), (2, 2))}
LABEL = "class_embedding.linear_1.weight"
USUAL = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "class_embeddings_concat": False,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "time_embedding_act_fn": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "cross_attention_norm": None,
    "attention_type": "default",
}
"""Values that ours have, and diffusers where a config has none."""


def names(config: UNetConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield (ours, theirs) of all modules."""
    yield from ((ours, [theirs]) for ours, theirs in (ENDS | LABELS).items())
    for stage, block, attention in stages(config):
        yield f"{stage}.block.conv", [f"{block}.conv"]
        yield from ((f"{stage}.block.{ours}", [f"{block}.{k}"]) for ours, k in BLOCK.items())
        if attention:
            own, layer = f"{stage}.attention", f"{attention}.transformer_blocks.0"
            yield from ((f"{own}.{ours}", [f"{attention}.{k}"]) for ours, k in AROUND.items())
            yield from ((f"{own}.{k}", [f"{layer}.{x}" for x in v]) for k, v in LAYER.items())


def unet_config(config: UNetConfig) -> dict[str, Any]:
    """Return the config of a U-Net, as diffusers writes it."""
    attends = [config.side >> i in config.attention for i in range(len(config.multipliers))]
    channels = [m * config.width for m in config.multipliers]
    found: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.side,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "down_block_types": [(ATTENDS if a else PLAIN)["down"] for a in attends],
        "mid_block_type": USUAL["mid_block_type"],
        "up_block_types": [(ATTENDS if a else PLAIN)["up"] for a in reversed(attends)],
        "block_out_channels": channels,
        "layers_per_block": config.blocks,
        "cross_attention_dim": config.text_width,
        "attention_head_dim": [c // config.head_width for c in channels],  # it is their number
        "use_linear_projection": True,
        "dropout": config.dropout,
    }
    if config.embedding_width:
        found["class_embed_type"] = "projection"
        found["projection_class_embeddings_input_dim"] = 2 * config.embedding_width
    return found


def write_unet(model: UNet, folder: Path) -> None:
    """Write a U-Net as a part of a pipeline; ValueError for one of other parts."""
    config = model.config
    stable, learns = config.stable_diffusion, config.learns_variance
    refuse(config, [("stable_diffusion", stable, "True"), ("learns_variance", not learns, "False")])
    theirs = to_theirs(model.state_dict(), names(config))
    if config.embedding_width:
        theirs[LABEL] = _scaled(theirs[LABEL], math.sqrt(config.embedding_width))
    write_part(folder, unet_config(config), theirs)


def read_config(theirs: dict[str, Any], **known: Any) -> UNetConfig:
    """Return the config of a U-Net from that of diffusers; see `read_unet`."""
    channels, side = theirs["block_out_channels"], theirs["sample_size"]
    heads = theirs.get("num_attention_heads") or theirs["attention_head_dim"]
    heads = heads if isinstance(heads, list) else [heads] * len(channels)
    attends = [kind == ATTENDS["down"] for kind in theirs["down_block_types"]]
    widths = {c // h for c, h, a in zip(channels, heads, [*attends[:-1], True]) if a}
    if len(widths) != 1:
        raise ValueError(f"heads are {sorted(widths)} channels wide, expected one width")
    has_label = theirs.get("class_embed_type") == "projection"
    sides = [side >> level for level, attend in enumerate(attends) if attend]
    return UNetConfig(
        stable_diffusion=True,
        width=channels[0],
        multipliers=tuple(c // channels[0] for c in channels),
        blocks=theirs["layers_per_block"],
        attention=tuple(sides),
        head_width=widths.pop(),
        channels=theirs["in_channels"],
        side=side,
        embedding_width=theirs["projection_class_embeddings_input_dim"] // 2 if has_label else 0,
        text_width=theirs["cross_attention_dim"],
        pooled_width=theirs["cross_attention_dim"],
        **known,
    )


def read_unet(folder: Path, null_caption: Tensor, length: float = 1.0, **known: Any) -> UNet:
    """Read a U-Net that `write_unet` or diffusers wrote, in eval mode.

    Args:
        null_caption: states of the empty caption, [T, W].
        length: length of the z_i that it was trained on.
        known: fields of the config that the folder does not hold: `objective`, `schedule`, `times`,
            `text_len`, `text_encoders`, `encoders`.

    Raises: ValueError where it is missing, damaged or of another architecture.
    """
    config, theirs = read_part(folder)
    refuse_values(folder, config, USUAL)
    with one_architecture(folder):
        c = read_config(config, **known)
        model = build(UNet, c, theirs)
        state = to_ours(theirs, names(c))
        for name, x in state.items():
            if name.endswith(("enter.weight", "leave.weight")):
                state[name] = x.flatten(1)  # some are 1×1 convolutions
        if c.embedding_width:
            name = "embedding_mlp.0.weight"
            state[name] = _scaled(state[name], length / math.sqrt(c.embedding_width))
        return fill(model, {**state, "null_caption": null_caption})


def _scaled(weight: Tensor, factor: float) -> Tensor:
    """Return the label's matrix with the columns of z_i scaled."""
    z, level = weight.chunk(2, dim=1)
    return torch.cat([z * factor, level], 1)
