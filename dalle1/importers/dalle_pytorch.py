"""Convert models that DALLE-pytorch trained, with their image tokenizer.

    dalle1 import dalle-pytorch dalle.pt bpe_simple_vocab_16e6.txt --out runs/converted

Its own dVAE and taming's VQGAN are converted with the transformer. Models with reversible layers,
rotary positions, shifted tokens, and random or convolutional attention are refused. Source:
lucidrains/DALLE-pytorch dalle_pytorch/{dalle_pytorch,transformer,attention}.py, version 1.6.6.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from dalle1.console import one_line_errors, parse
from dalle1.image_tokenizer import ImageTokenizer
from dalle1.importers.checkpoint import unpickle
from dalle1.importers.clip_bpe import read_clip_bpe
from dalle1.importers.command import ModelOptions, for_grid, write_image_tokenizer
from dalle1.importers.openai_dvae import build_dvae, renamed
from dalle1.importers.state_dict import KINDS, Foreign, build_transformer, one_error, rows
from dalle1.importers.vqgan import MARKER, build_vqgan
from dalle1.importers.yttm import read_yttm
from dalle1.model.masks import MaskKind
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.model_card import ModelInfo
from dalle1.sampling.generation import GenerationConfig
from dalle1.text.bpe import Tokenizer
from dalle1.text.format import TextFormat
from dalle1.vqgan.strided_dvae import StridedDVAE, StridedDVAEConfig

GENERATION = GenerationConfig()
KINDS_OF_ATTENTION: dict[str, MaskKind] = {
    "full": "full",
    "axial_row": "line",
    "axial_col": "column",
}
REFUSED = {
    "reversible": (False, "reversible layers"),
    "rotary_emb": (True, "rotary positions"),
    "shift_tokens": (True, "shifted tokens"),
    "sparse_attn": (False, "random blocks of attention"),
}
"""Hyperparameter → (its default in the class, what it is)."""
CODEBOOK = "codebook.weight"
"""A tensor of its own dVAE."""
_NAMES = re.compile(
    r"transformer\.layers\.(?:layers\.)?(\d+)\.([01])\.(?:.*\.)?"
    r"(norm_out|norm|to_qkv|to_out\.0|net\.0|net\.3)\.(weight|bias)$"
)
_PARTS = {
    ("0", "norm"): "attention.norm",
    ("0", "norm_out"): "attention.out_norm",
    ("0", "to_qkv"): "attention.branch.qkv",
    ("0", "to_out.0"): "attention.branch.out",
    ("1", "norm"): "mlp.norm",
    ("1", "norm_out"): "mlp.out_norm",
    ("1", "net.0"): "mlp.branch.up",
    ("1", "net.3"): "mlp.branch.down",
}


NORMALIZED = 0.5
"""Mean and standard deviation of the colours that its dVAE reads."""


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], Foreign, dict[str, Any] | None]:
    """Return the hyperparameters of a checkpoint, its tensors, and those of its own dVAE.

    A dVAE alone, vae.pt, has the hyperparameters {}.

    Raises: ValueError where the file is another, or of a model that is not supported.
    """
    content = unpickle(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("hparams"), Mapping):
        raise ValueError(f"{path} has no hparams, expected a dalle.pt of DALLE-pytorch")
    if not isinstance(content.get("weights"), Mapping):
        raise ValueError(f"{path} has no weights, expected a dalle.pt of DALLE-pytorch")
    params = dict(content["hparams"])
    tensors = {k: t for k, t in content["weights"].items() if isinstance(t, Tensor)}
    if CODEBOOK in tensors:
        tensors = {f"vae.{name}": tensor for name, tensor in tensors.items()}
        return {}, Foreign(tensors, f"vae.{CODEBOOK}", path), params
    for name, (default, what) in REFUSED.items():
        value = params.get(name, default)
        if any(value) if isinstance(value, (list, tuple)) else value:
            raise ValueError(f"{path} has {what} ({name}), which is not supported")
    for kind in _attention(params):
        if kind not in KINDS_OF_ATTENTION:
            raise ValueError(
                f"{path} has attention of type {kind!r}, which is not supported; expected "
                f"{', '.join(KINDS_OF_ATTENTION)}"
            )
    return params, Foreign(tensors, "to_logits.1.weight", path), content.get("vae_params")


def _attention(params: Mapping[str, Any]) -> list[str]:
    types = params.get("attn_types") or ("full",)
    return [str(kind) for kind in types] if isinstance(types, (list, tuple)) else [str(types)]


def load_transformer(tensors: Foreign, params: Mapping[str, Any]) -> Transformer:
    """Load the transformer; `params` are the hyperparameters of the file."""
    numbers = {"heads": 8, "dim_head": 64, **params}
    for name in ("text_seq_len", "depth", "num_text_tokens", "dim", "heads", "dim_head"):
        if type(numbers.get(name)) is not int:
            raise ValueError(
                f"{tensors.path} has the hyperparameter {name} {numbers.get(name)!r}, expected a "
                "number"
            )
    if not 0 < numbers["depth"] <= len(tensors.tensors):
        raise ValueError(
            f"{tensors.path} has the hyperparameter depth {numbers['depth']}, expected at least 1 "
            f"and at most the number of its tensors, {len(tensors.tensors)}"
        )
    text_len, depth, vocab = numbers["text_seq_len"] + 1, params["depth"], params["num_text_tokens"]
    axes = [_axis(tensors, i) for i in (0, 1)]
    config = TransformerConfig(
        text_vocab=vocab,
        text_len=text_len,
        width=params["dim"],
        depth=depth,
        heads=numbers["heads"],
        head_width=numbers["dim_head"],
        image_start="none",
        masks=tuple(KINDS_OF_ATTENTION[k] for k in islice(cycle(_attention(params)), depth)),
        sandwich=bool(params.get("sandwich_norm", False)),
        mlp="geglu",
        codebook_size=len(tensors["to_logits.1.weight"]) - vocab - text_len + 1,
        grid_size=len(axes[0]),
    )
    with one_error(tensors.path):
        state = _layers(tensors, config)
        state |= {"row.weight": axes[0], "column.weight": axes[1]}
        state |= {f"norm.{kind}": tensors[f"to_logits.0.{kind}"] for kind in KINDS}
        state |= _vocabularies(tensors, config, bool(params.get("share_input_output_emb", False)))
    return build_transformer(config, state, tensors.path)


def _axis(tensors: Foreign, axis: int) -> Tensor:
    """Return the embeddings of rows (0) or columns (1), [W, D], under either of their names."""
    names = [f"image_pos_emb.weights{separator}{axis}" for separator in "._"]
    table = tensors[names[1] if names[1] in tensors else names[0]]
    return table.reshape(-1, table.shape[-1])


def _vocabularies(tensors: Foreign, config: TransformerConfig, shared: bool) -> dict[str, Tensor]:
    """Return tables and heads: a start token, which is also token 0, then the padding.

    Their padding of a caption's position p is ours of position p + 1, since ours counts the start.
    """
    vocab, split = config.text_vocab, len(tensors["to_logits.1.weight"]) - config.codebook_size
    head, bias = tensors["to_logits.1.weight"], tensors["to_logits.1.bias"]
    text = head[:split] if shared else tensors["text_emb.weight"]
    image = head[split:] if shared else tensors["image_emb.weight"]
    never = bias.new_full((1,), -1e4)  # the start token as padding is not predicted

    def with_start(table: Tensor, start: Tensor) -> Tensor:
        return torch.cat([table[:vocab], start, table[vocab:]])

    return {
        "text_embedding.weight": rows(with_start(text, text[:1]), split + 2),
        "image_embedding.weight": rows(image, config.codebook_size + 1),
        "text_position.weight": tensors["text_pos_emb.weight"],
        "text_head.weight": with_start(head[:split], torch.zeros_like(head[:1])),
        "text_head.bias": with_start(bias[:split], never),
        "image_head.weight": head[split:],
        "image_head.bias": bias[split:],
    }


def _layers(tensors: Foreign, config: TransformerConfig) -> dict[str, Tensor]:
    """Return the tensors of all layers; the scales of branches become part of their last layer."""
    state: dict[str, Tensor] = {}
    for name in list(tensors.tensors):
        if match := _NAMES.search(name):
            layer, branch, part, kind = match.groups()
            state[f"layers.{layer}.{_PARTS[branch, part]}.{kind}"] = tensors[name]
    for i in range(config.depth):
        qkv = f"layers.{i}.attention.branch.qkv"
        if f"{qkv}.weight" in state:
            state[f"{qkv}.bias"] = state[f"{qkv}.weight"].new_zeros(len(state[f"{qkv}.weight"]))
        for kind in KINDS:
            up = f"layers.{i}.mlp.branch.up.{kind}"
            if up in state:  # theirs has the gate second
                state[up] = torch.cat(state[up].chunk(2)[::-1])
        for branch, ours, last in (("0", "attention", "out"), ("1", "mlp", "down")):
            scale = tensors[f"transformer.layers.layers.{i}.{branch}.scale"].flatten()
            name = f"layers.{i}.{ours}." + ("out_norm" if config.sandwich else f"branch.{last}")
            for kind in KINDS:
                if f"{name}.{kind}" in state:
                    value = state[f"{name}.{kind}"]
                    state[f"{name}.{kind}"] = scale.view(-1, *[1] * (value.ndim - 1)) * value
    return state


def load_image_tokenizer(
    tensors: Foreign, vae_params: Mapping[str, Any] | None, transformer: Transformer | None
) -> ImageTokenizer:
    """Load the image tokenizer of the same file: its own dVAE, OpenAI's, or taming's VQGAN.

    Args:
        transformer: what it is for; None for a dVAE alone.
    """
    found = {
        name.removeprefix("vae."): tensor
        for name, tensor in tensors.tensors.items()
        if name.startswith("vae.")
    }
    tensors.unread -= {f"vae.{name}" for name in found}
    if transformer is not None and f"model.{MARKER}" in found:
        return for_grid(build_vqgan(Foreign(found, MARKER, tensors.path)), transformer)
    if transformer is not None and "enc.blocks.input.w" in found:
        encoder, decoder = (
            {renamed(k[4:]): t.float() for k, t in found.items() if k.startswith(part)}
            for part in ("enc.", "dec.")
        )
        dvae = build_dvae(encoder, decoder, tensors.path, tensors.path)
        size = transformer.config.grid_size * dvae.downsampling
        dvae.config = replace(dvae.config, image_size=size)
        return dvae
    if CODEBOOK not in found:
        raise ValueError(
            f"{tensors.path} has no dVAE of DALLE-pytorch or OpenAI and no VQGAN of taming; import "
            "its image tokenizer by openai-dvae or vqgan, and train a transformer on its codes"
        )
    return _strided_dvae(found, dict(vae_params or {}), transformer, tensors.path)


def _strided_dvae(
    found: Mapping[str, Tensor],
    params: Mapping[str, Any],
    transformer: Transformer | None,
    path: str | Path,
) -> StridedDVAE:
    """Load DALLE-pytorch's own dVAE with the hyperparameters `params`."""
    normalization = params.get("normalization", ((NORMALIZED,) * 3,) * 2)
    try:
        colours = [float(x) for values in normalization for x in values[:3]]
    except (TypeError, ValueError):
        colours = []
    if len(colours) != 6 or set(colours) != {NORMALIZED}:
        raise ValueError(
            f"{path} has a dVAE with normalization {normalization}, expected means and standard "
            f"deviations of {NORMALIZED}; other ones are not supported"
        )
    convolutions = [name for name in found if re.fullmatch(r"encoder\.\d+\.0\.weight", name)]
    first = found.get("encoder.0.0.weight")
    if first is None or first.ndim != 4 or first.shape[1] != 3:
        raise ValueError(f"{path} has a dVAE of other than 3 channels; expected 3")
    size = params.get("image_size")
    if transformer is not None:
        size = transformer.config.grid_size << len(convolutions)
    elif type(size) is not int or size < 1:
        raise ValueError(f"{path} has the hyperparameter image_size {size!r}, expected a number")
    config = StridedDVAEConfig(
        image_size=size,
        width=len(first),
        layers=len(convolutions),
        blocks=sum(name.endswith("net.0.weight") for name in found if name.startswith("encoder.")),
        codebook_size=found[CODEBOOK].shape[0],
        code_width=found[CODEBOOK].shape[1],
    )
    with one_error(path, "a dVAE"):
        with torch.device("meta"):
            model = StridedDVAE(config)
        model.load_state_dict({k: t.float() for k, t in found.items()}, strict=True, assign=True)
    return model.eval()


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Load the vocabulary of a model: CLIP's merges, JSON of `tokenizers`, or of youtokentome."""
    suffixes = path.suffixes
    if path.suffix == ".json":
        bpe = Tokenizer.load(path).bpe
    else:
        bpe = read_clip_bpe(path) if {".txt", ".gz"} & set(suffixes) else read_yttm(path)
    if bpe.get_vocab_size() > vocab_size:
        raise ValueError(
            f"{path} has {bpe.get_vocab_size()} tokens, the transformer {vocab_size}; use the "
            "vocabulary that it was trained with"
        )
    clip = bool({".txt", ".gz"} & set(suffixes))
    return Tokenizer(
        bpe,
        format=TextFormat(
            clean="clip" if clip else "none",
            bos=(0,),
            pad_id=0,
            fills_all=True,
            vocab_size=vocab_size,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ImportConfig(ModelOptions):
    """Options of `dalle1 import dalle-pytorch`."""

    checkpoint: tyro.conf.Positional[Path]
    """The file of a training, dalle.pt, or vae.pt for a dVAE alone."""
    vocabulary: tyro.conf.Positional[Path | None] = None
    """Vocabulary of dalle.pt: bpe_simple_vocab_16e6.txt, a .json of tokenizers, or one of
    youtokentome."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ImportConfig, args, __doc__.splitlines()[0])
        config.check()
        params, tensors, vae_params = read_checkpoint(config.checkpoint)
        if not params:
            dvae = load_image_tokenizer(tensors, vae_params, None)
            write_image_tokenizer(dvae, config.out, None)
            return
        if config.vocabulary is None:
            raise ValueError(
                f"{config.checkpoint} has a transformer, and no vocabulary is named; add the one "
                "of its training after it"
            )
        if params.get("stable"):
            warnings.warn(
                f"{config.checkpoint} was trained with stable, which scales what LayerNorm adds "
                "its epsilon to; logits may differ by 0.01 % of the largest",
                stacklevel=1,
            )
        if config.heads is not None:
            params["heads"] = config.heads
        transformer = load_transformer(tensors, params)
        image_tokenizer = load_image_tokenizer(tensors, vae_params, transformer)
        tensors.warn_of_unread()
        tokenizer = load_tokenizer(config.vocabulary, params["num_text_tokens"])
        config.write(image_tokenizer, transformer, tokenizer, ModelInfo(), GENERATION)
