"""Convert a KL autoencoder of diffusers, such as Stable Diffusion's, to train decoders on it.

    dalle1 import vae stable-diffusion/vae --out runs/autoencoder

reads config.json and diffusion_pytorch_model.safetensors: an `AutoencoderKL`. `dalle1 embed` and
`dalle1 train decoder` then take runs/autoencoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from torch import Tensor

from dalle1.console import one_line_errors, parse
from dalle2.exchange.parts import (
    build,
    fill,
    new_folder,
    one_architecture,
    read_part,
    refuse_values,
    write_part,
)
from dalle2.ldm_autoencoder import LDMAutoencoder, LDMAutoencoderConfig

# Ours, as in taming-transformers, and diffusers'; levels of its decoder are counted from below.
NAMES = (
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
    ("mid.attn_1", "mid_block.attentions.0"),
    ("norm_out", "conv_norm_out"),
    ("nin_shortcut", "conv_shortcut"),
    ("downsample", "downsamplers.0"),
    ("upsample", "upsamplers.0"),
)
MATRIX = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")
"""Weights of 1×1 convolutions, which are matrices there."""


def their_name(name: str, levels: int) -> str:
    """Return diffusers' name of one of our parameters."""
    for ours, theirs in NAMES:
        name = name.replace(f".{ours}.", f".{theirs}.")
    name = re.sub(r"attentions\.0\.([qkv])\.", r"attentions.0.to_\1.", name)
    name = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", name)
    name = re.sub(r"\.up\.(\d+)\.", lambda level: f".up_blocks.{levels - 1 - int(level[1])}.", name)
    return name.replace(".block.", ".resnets.")


def autoencoder_config(config: LDMAutoencoderConfig) -> dict[str, Any]:
    """Return the config of an autoencoder, as diffusers writes it."""
    levels = len(config.multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": config.image_size,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [m * config.width for m in config.multipliers],
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": 32,
        "scaling_factor": config.scaling_factor,
    }


def write_autoencoder(model: LDMAutoencoder, folder: Path) -> None:
    """Write an autoencoder as a part of a pipeline."""
    levels = len(model.config.multipliers)
    tensors = {
        their_name(name, levels): x.flatten(1) if MATRIX.search(name) else x
        for name, x in model.state_dict().items()
    }
    write_part(folder, autoencoder_config(model.config), tensors)


def read_autoencoder(folder: Path) -> LDMAutoencoder:
    """Read an `AutoencoderKL`, in eval mode.

    Raises: ValueError where it is missing, damaged or of another architecture.
    """
    theirs, tensors = read_part(folder)
    usual = {"act_fn": "silu", "norm_num_groups": 32, "mid_block_add_attention": True}
    usual |= {"use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None}
    refuse_values(folder, theirs, usual | {"latents_mean": None})
    with one_architecture(folder):
        width = theirs["block_out_channels"][0]
        config = LDMAutoencoderConfig(
            image_size=theirs.get("sample_size", 512),
            width=width,
            multipliers=tuple(channels // width for channels in theirs["block_out_channels"]),
            blocks=theirs["layers_per_block"],
            latent_channels=theirs["latent_channels"],
            scaling_factor=theirs.get("scaling_factor", 0.18215),
        )
        model = build(LDMAutoencoder, config, tensors)
        return fill(model, _ours(tensors, model.state_dict(), len(config.multipliers)))


def _ours(
    theirs: Mapping[str, Tensor], shapes: Mapping[str, Tensor], levels: int
) -> dict[str, Tensor]:
    """Return diffusers' tensors by our names, in our shapes."""
    if len(theirs) > len(shapes):
        raise KeyError(f"it has {len(theirs)} tensors, expected {len(shapes)}")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, x in shapes.items():
        wanted = their_name(name, levels)
        before = wanted
        for now, then in old.items():  # names of 2022, as in Stable Diffusion's files
            before = before.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        tensor = theirs[wanted if wanted in theirs else before]
        found[name] = tensor.view(x.shape) if MATRIX.search(name) else tensor
    return found


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Options of `dalle1 import vae`."""

    folder: tyro.conf.Positional[Path]
    """Folder of the autoencoder, with config.json."""
    out: Path
    """Folder to write autoencoder.safetensors to."""
    image_size: int = 256
    """Side of its images in pixels, for the decoder that is trained on it."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ImportConfig, args, __doc__.splitlines()[0])
        with new_folder(config.out) as path:
            model = read_autoencoder(config.folder)
            if config.image_size < 1 or config.image_size % model.downsampling:
                raise ValueError(
                    f"image_size is {config.image_size}, expected a multiple of "
                    f"{model.downsampling}"
                )
            model.config = replace(model.config, image_size=config.image_size)
            model.save(path)
        c, h, w = model.latent_shape
        side = config.image_size
        print(f"The autoencoder is in {config.out}: {c} × {h} × {w} latents of {side} pixels")
