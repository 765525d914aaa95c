"""Write and read a decoder as two parts of karlo's unCLIP.

    FOLDER/decoder     the U-Net: UNet2DConditionModel, with SimpleCrossAttn blocks
    FOLDER/text_proj   its inlets of z_i and caption: UnCLIPTextProjModel

GLIDE's block is the same in both. Only names differ, and how matrices are stacked: `qkv` is three
matrices there, `context` two; the K tokens of z_i are interleaved there; and z_i, which is scaled
by √D here, is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dalle2.exchange.parts import (
    both,
    build,
    fill,
    one_architecture,
    read_part,
    refuse,
    to_ours,
    to_theirs,
    write_part,
)
from dalle2.unet import UNet, UNetConfig

WITH_ATTENTION = {"down": "SimpleCrossAttnDownBlock2D", "up": "SimpleCrossAttnUpBlock2D"}
WITHOUT = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
ENDS = {
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "input": "conv_in",
    "output.0": "conv_norm_out",
    "output.2": "conv_out",
}
BLOCK = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "modulation": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "identity": "conv_shortcut",
}
INLETS = {
    "embedding_vector": "clip_image_embeddings_project_to_time_embeddings",
    "embedding_tokens": "clip_extra_context_tokens_proj",
    "text_tokens": "encoder_hidden_states_proj",
    "caption_vector": "embedding_proj",
    "text_norm": "text_encoder_hidden_states_norm",
}
NULL = ("null_embedding", "learned_classifier_free_guidance_embeddings")


class Names(NamedTuple):
    """A stage of the U-Net, and the names of its two parts in diffusers."""

    stage: str
    block: str
    attention: str


def stages(config: UNetConfig) -> Iterator[Names]:
    """Yield all stages in order."""
    levels, last = len(config.multipliers), len(config.multipliers) - 1
    number = 0
    for level in range(levels):
        where = f"down_blocks.{level}"
        for i in range(config.blocks):
            yield Names(f"down.{number}", f"{where}.resnets.{i}", f"{where}.attentions.{i}")
            number += 1
        if level < last:
            yield Names(f"down.{number}", f"{where}.downsamplers.0", "")
            number += 1
    yield Names("middle.0", "mid_block.resnets.0", "mid_block.attentions.0")
    yield Names("middle.1", "mid_block.resnets.1", "")
    number = 0
    for level in range(levels):
        where = f"up_blocks.{level}"
        for i in range(config.blocks + 1):
            yield Names(f"up.{number}", f"{where}.resnets.{i}", f"{where}.attentions.{i}")
            number += 1
        if level < last:
            yield Names(f"up.{number}", f"{where}.upsamplers.0", "")
            number += 1


def names(config: UNetConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield (ours, theirs) of all modules of the U-Net."""
    yield from ((ours, [theirs]) for ours, theirs in ENDS.items())
    for stage, block, attention in stages(config):
        yield from ((f"{stage}.block.{k}", [f"{block}.{v}"]) for k, v in BLOCK.items())
        if attention:
            yield f"{stage}.attention.norm", [f"{attention}.group_norm"]
            yield f"{stage}.attention.out", [f"{attention}.to_out.0"]
            yield f"{stage}.attention.qkv", [f"{attention}.to_{x}" for x in "qkv"]
            yield f"{stage}.attention.context", [f"{attention}.add_{x}_proj" for x in "kv"]


def refuse_other_sizes(config: UNetConfig) -> None:
    """Raise ValueError for a decoder that karlo's parts cannot hold."""
    lowest = config.side >> (len(config.multipliers) - 1)
    refuse(
        config,
        [
            ("karlo", config.karlo, "True"),
            ("width", config.width % 32 == 0, "a multiple of 32"),
            ("group_width", config.group_width == 1, "1"),
            ("multipliers", config.multipliers[0] == 1, "1 as the first"),
            ("attention", lowest in config.attention, f"to include {lowest}, the smallest side"),
            ("text_encoders", not config.text_encoders, "none"),
            ("text_width", config.text_width == config.embedding_width, "that of the embeddings"),
        ],
    )


def decoder_config(config: UNetConfig) -> dict[str, Any]:
    """Return the config of the U-Net, as diffusers writes it."""
    attends = [config.side >> i in config.attention for i in range(len(config.multipliers))]
    down = [(WITH_ATTENTION if a else WITHOUT)["down"] for a in attends]
    up = [(WITH_ATTENTION if a else WITHOUT)["up"] for a in reversed(attends)]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.side,
        "in_channels": config.channels,
        "out_channels": config.channels * (2 if config.learns_variance else 1),
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": up,
        "block_out_channels": [m * config.width for m in config.multipliers],
        "layers_per_block": config.blocks,
        "norm_num_groups": 32,
        "cross_attention_dim": config.context_width or 4 * config.width,
        "attention_head_dim": config.head_width,
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "identity",
        "dropout": config.dropout,
    }


def inlets_config(config: UNetConfig) -> dict[str, Any]:
    """Return the config of the inlets, as diffusers writes it."""
    return {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": config.image_tokens,
        "clip_embeddings_dim": config.embedding_width,
        "time_embed_dim": 4 * config.width,
        "cross_attention_dim": config.context_width or 4 * config.width,
    }


def interleaved(rows: Tensor, tokens: int, back: bool = False) -> Tensor:
    """Reorder the rows of K tokens of X numbers, [K·X, …]: token by token here, mixed there."""
    return rows.unflatten(0, (-1, tokens) if back else (tokens, -1)).transpose(0, 1).flatten(0, 1)


def write_decoder(model: UNet, folder: str | Path) -> None:
    """Write a decoder as karlo's parts; ValueError for a size that they cannot hold."""
    config, state = model.config, model.state_dict()
    refuse_other_sizes(config)
    theirs = to_theirs(state, names(config))
    write_part(Path(folder) / "decoder", decoder_config(config), theirs)
    scale = math.sqrt(config.embedding_width)
    inlets = {NULL[1]: state[NULL[0]] / scale}
    for own, name in INLETS.items():
        for kind, x in both(state, own):
            y = interleaved(x, config.image_tokens) if own == "embedding_tokens" else x
            reads_image = own.startswith("embedding") and kind == "weight"
            inlets[f"{name}.{kind}"] = y * scale if reads_image else y
    write_part(Path(folder) / "text_proj", inlets_config(config), inlets)


def read_config(unet: dict[str, Any], inlets: dict[str, Any], **known: Any) -> UNetConfig:
    """Return the config of a decoder from those of its parts.

    Args:
        known: fields that the parts do not hold, such as `objective` and `pixels`.
    """
    width, side = unet["block_out_channels"][0], unet["sample_size"]
    attends = [kind == WITH_ATTENTION["down"] for kind in unet["down_block_types"]]
    sides = [side >> i for i, attend in enumerate(attends) if attend]
    lowest = side >> (len(attends) - 1)
    return UNetConfig(
        width=width,
        multipliers=tuple(channels // width for channels in unet["block_out_channels"]),
        blocks=unet["layers_per_block"],
        attention=tuple(dict.fromkeys([*sides, lowest])),
        head_width=unet["attention_head_dim"],
        image_tokens=inlets["clip_extra_context_tokens"],
        context_width=unet["cross_attention_dim"],
        karlo=True,
        learns_variance=unet["out_channels"] == 2 * unet["in_channels"],
        channels=unet["in_channels"],
        side=side,
        embedding_width=inlets["clip_embeddings_dim"],
        text_width=inlets["clip_embeddings_dim"],
        **known,
    )


def read_decoder(folder: str | Path, **known: Any) -> UNet:
    """Read a decoder that `write_decoder` or diffusers wrote, in eval mode; see `read_config`.

    Raises: ValueError where a part is missing, damaged or of another architecture.
    """
    unet, theirs = read_part(Path(folder) / "decoder")
    inlets, more = read_part(Path(folder) / "text_proj")
    with one_architecture(Path(folder)):
        config = read_config(unet, inlets, **known)
        model = build(UNet, config, {**theirs, **more})
        state = to_ours(theirs, names(config))
        scale = math.sqrt(config.embedding_width)
        state[NULL[0]] = more[NULL[1]] * scale
        for own, name in INLETS.items():
            for kind, x in both(more, name):
                y = interleaved(x, config.image_tokens, True) if own == "embedding_tokens" else x
                reads_image = own.startswith("embedding") and kind == "weight"
                state[f"{own}.{kind}"] = y / scale if reads_image else y
        return fill(model, state)
