"""Convert a VQGAN of taming-transformers, latent diffusion, ru-dalle or LlamaGen.

    dalle1 import vqgan last.ckpt --out runs/vqgan

All sizes are read from the shapes of the parameters; no YAML file is needed. Known are the VQGANs
with nearest codes, with Gumbel codes, ru-dalle's whose decoder ends in an inverse wavelet
transform, and LlamaGen's with codes of length 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from einops import rearrange
from torch import Tensor

from dalle1.console import one_line_errors, parse
from dalle1.importers.checkpoint import numbers_after, read_state_dict
from dalle1.importers.command import refuse_training, write_image_tokenizer
from dalle1.importers.state_dict import Foreign, one_error
from dalle1.vqgan import VQGAN, VQGANConfig

MARKER = "encoder.conv_in.weight"
"""A tensor that every VQGAN has."""
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")

LICENSE = "MIT for taming-transformers, latent diffusion and LlamaGen; others': see their source"

# An inverse Haar transform: ½ of the sums over LL, LH, HL, HH for each pixel of a 2×2 block.
HAAR = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2


def load_vqgan(path: str | Path, image_size: int | None = None) -> VQGAN:
    """Load a foreign VQGAN; warn of tensors in the file that are no part of one.

    Args:
        image_size: side of its images in pixels; None: 256, or 512 for a decoder with wavelets.

    Raises: ValueError where the file holds no such model, or lacks some of its parameters.
    """
    tensors = read_state_dict(path, keys=("state_dict", "model"))
    return build_vqgan(Foreign(tensors, MARKER, path), image_size)


def build_vqgan(tensors: Foreign, image_size: int | None = None) -> VQGAN:
    """Build a VQGAN from foreign tensors; see `load_vqgan`."""
    with one_error(tensors.path, "a VQGAN"):
        named = _without_wavelets(_of_llamagen(tensors.tensors))
        used = {k: t.float() for k, t in named.items() if k.startswith(PARTS)}
        used.pop("quantize.codebook_used", None)
        normalized = any(name.startswith("encoder.conv_blocks.") for name in tensors.tensors)
        config = read_sizes(used, normalized, image_size)
        if config.blocks * len(config.multipliers) > len(used):
            raise LookupError("fewer tensors than residual blocks")
        with torch.device("meta"):  # shapes that do not fit together may be of any size
            model = VQGAN(config)
        model.load_state_dict(used, strict=True, assign=True)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tensors.unread = set(named) - set(used)
    tensors.warn_of_unread("loss.", "quantize.codebook_used")  # the losses of its training
    return model.eval()


def read_sizes(
    tensors: Mapping[str, Tensor], normalized: bool, image_size: int | None
) -> VQGANConfig:
    """Return the config that the shapes of the parameters determine."""
    width = tensors["encoder.conv_in.weight"].shape[0]
    levels = list(numbers_after("encoder.down.", tensors))
    first = [tensors[f"encoder.down.{i}.block.0.conv1.weight"] for i in levels]
    gumbel = "quantize.proj.weight" in tensors
    codes = tensors["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
    shuffle = 2 if tensors["decoder.conv_out.weight"].shape[0] == 12 else 1
    return VQGANConfig(
        image_size=image_size or 256 * shuffle,
        width=width,
        multipliers=tuple(weight.shape[0] // width for weight in first),
        blocks=len(list(numbers_after("encoder.down.0.block.", tensors))),
        attention=tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in tensors),
        latent_width=tensors["encoder.conv_out.weight"].shape[0],
        code_width=codes.shape[1],
        codebook_size=codes.shape[0],
        quantizer="gumbel" if gumbel else "normalized" if normalized else "nearest",
        pixel_shuffle=shuffle,
    )


def _without_wavelets(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the inverse wavelet transform after ru-dalle's decoder into its last convolution."""
    if "decoder.decoder.conv_out.weight" not in tensors:
        return dict(tensors)
    renamed = {
        re.sub(r"^decoder\.(decoder\.|post_quant_conv\.)", _unnested, name): tensor
        for name, tensor in tensors.items()
        if not name.startswith("decoder.idwt.")
    }
    for kind in ("weight", "bias"):
        name = f"decoder.conv_out.{kind}"
        low, high = renamed[name][:3], renamed[name][3:]  # LL; LH, HL and HH of each colour
        bands = torch.cat(
            [rearrange(low, "c ... -> c 1 ..."), rearrange(high, "(c s) ... -> c s ...", c=3)], 1
        )
        pixels = torch.einsum("ps,cs...->cp...", HAAR.to(bands.dtype), bands)
        renamed[name] = rearrange(pixels, "c p ... -> (c p) ...")  # as pixel_shuffle reads them
    return renamed


def _unnested(match: re.Match[str]) -> str:
    return "decoder." if match[1] == "decoder." else match[1]


_LLAMAGEN = (  # theirs → taming's
    (r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block."),
    (r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)


def _of_llamagen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename LlamaGen's parameters, whose decoder counts levels from the lowest resolution."""
    levels = len(list(numbers_after("decoder.conv_blocks.", tensors)))
    if not levels:
        return dict(tensors)

    def renamed(name: str) -> str:
        for theirs, ours in _LLAMAGEN:
            name = re.sub(theirs, ours, name)
        if match := re.match(r"decoder\.conv_blocks\.(\d+)\.(res\.)?(.*)", name):
            block = "block." if match[2] else ""
            name = f"decoder.up.{levels - 1 - int(match[1])}.{block}{match[3]}"
        return name

    return {renamed(name): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Options of `dalle1 import vqgan`."""

    checkpoint: tyro.conf.Positional[Path]
    """The published file: last.ckpt, *.ckpt, *.pt or *.safetensors."""
    out: Path
    """Folder to write image_tokenizer.safetensors to."""
    image_size: int | None = None
    """Side of its images in pixels. None: 256, or 512 where the decoder has wavelets."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ImportConfig, args, __doc__.splitlines()[0])
        refuse_training(config.out)
        model = load_vqgan(config.checkpoint, config.image_size)
        write_image_tokenizer(model, config.out, LICENSE)
