"""Convert OpenAI's released dVAE, without its package and without running its pickles.

    dalle1 import openai-dvae encoder.pkl decoder.pkl --out runs/openai-dvae

`encoder.pkl` and `decoder.pkl` (https://cdn.openai.com/dall-e/) are pickles of whole modules of the
`dall_e` package. Unpickling one as it is would import and call whatever it names; see
`dalle1.importers.checkpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from dalle1.console import one_line_errors, parse
from dalle1.importers.checkpoint import Stub, unpickle
from dalle1.importers.command import refuse_training, write_image_tokenizer
from dalle1.importers.state_dict import one_error
from dvae import DVAE, DVAEConfig

CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)
"""Classes that a pickle may name, besides tensors and containers."""

LICENSE = "modified MIT, which asks to indicate that the model was used (github.com/openai/DALL-E)"

_NAMES = (  # theirs → ours
    (r"^blocks\.", ""),
    (r"group_(\d+)\.block_(\d+)", lambda m: f"groups.{int(m[1]) - 1}.{int(m[2]) - 1}"),
    (r"\bid_path\b", "identity"),
    (r"\bres_path\b", "residual"),
    (r"^output\.conv\b", "output"),
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
)


def read_module(path: str | Path) -> dict[str, Tensor]:
    """Read the parameters of a pickled module of `dall_e`, under the names of `DVAE`.

    Raises: ValueError where the file is no such pickle, or names a class not in `CLASSES`.
    """
    module = unpickle(path, CLASSES)
    if not isinstance(module, Stub):
        raise ValueError(
            f"{path} holds a {type(module).__name__}, expected a pickled module of dall_e"
        )
    return {renamed(name): tensor.detach().float() for name, tensor in _parameters(module)}


def _parameters(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, tensor in vars(module).get("_parameters", {}).items():
        if isinstance(tensor, Tensor):
            yield prefix + name, tensor
    for name, child in vars(module).get("_modules", {}).items():
        if isinstance(child, Stub):
            yield from _parameters(child, f"{prefix}{name}.")


def renamed(name: str) -> str:
    """Return our name of a parameter of `dall_e`."""
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    return name


def sizes(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, int]:
    """Return the fields of `DVAEConfig` that the shapes of the parameters determine.

    Raises: ValueError where the files hold no encoder and decoder.
    """
    for what, part, kernel in (("encoder", encoder, 7), ("decoder", decoder, 1)):
        weight = part.get("input.weight")
        if weight is None or weight.ndim != 4 or weight.shape[-1] != kernel:
            raise ValueError(
                f"the first file should be encoder.pkl and the second decoder.pkl, but the {what} "
                f"has no first convolution of {kernel} × {kernel}; check their order"
            )
    blocks = {name.split(".")[2] for name in encoder if name.startswith("groups.0.")}
    return {
        "width": encoder["input.weight"].shape[0],
        "blocks_per_group": len(blocks),
        "codebook_size": decoder["input.weight"].shape[1],
        "code_width": decoder["input.weight"].shape[0],
    }


def load_openai_dvae(encoder_pkl: str | Path, decoder_pkl: str | Path) -> DVAE:
    """Load OpenAI's released pickles, without running their code; ValueError for any other file."""
    return build_dvae(read_module(encoder_pkl), read_module(decoder_pkl), encoder_pkl, decoder_pkl)


def build_dvae(
    encoder: dict[str, Tensor],
    decoder: dict[str, Tensor],
    encoder_pkl: str | Path,
    decoder_pkl: str | Path,
) -> DVAE:
    """Build a dVAE around parameters under the names of `DVAE`; the paths are for errors."""
    with one_error(encoder_pkl, "the paper's dVAE"), torch.device("meta"):
        model = DVAE(DVAEConfig(**sizes(encoder, decoder)))
    for what, part, weights in (
        (encoder_pkl, model.encoder, encoder),
        (decoder_pkl, model.decoder, decoder),
    ):
        with one_error(what, "the paper's dVAE"):
            part.load_state_dict(weights, strict=True, assign=True)
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Options of `dalle1 import openai-dvae`."""

    encoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")]
    """The released encoder.pkl."""
    decoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DECODER")]
    """The released decoder.pkl."""
    out: Path
    """Folder to write dvae.safetensors to."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ImportConfig, args, __doc__.splitlines()[0])
        refuse_training(config.out)
        model = load_openai_dvae(config.encoder, config.decoder)
        write_image_tokenizer(model, config.out, LICENSE)
