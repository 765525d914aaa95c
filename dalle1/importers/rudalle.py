"""Convert ru-dalle's models (Malevich, Surrealist XL, Kandinsky 12B) and RuDOLPH's.

    dalle1 import rudalle pytorch_model_v3.bin vqgan.gumbelf8-sber.model.ckpt bpe.model --out DIR

Transformers of ru-dalle and RuDOLPH read text and codes as one stream without start tokens, with
the paper's sparse masks and a norm on either side of each branch (CogView's sandwich). RuDOLPH has
smaller kernels, and special tokens. Sources: ai-forever/ru-dalle rudalle/dalle/model.py,
rudalle/dalle/transformer.py; ai-forever/ru-dolph rudolph/model/model.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from dalle1.console import one_line_errors, parse
from dalle1.importers.checkpoint import read_state_dict
from dalle1.importers.command import ModelOptions, for_grid
from dalle1.importers.state_dict import KINDS, Foreign, build_transformer, one_error, rows
from dalle1.importers.vqgan import load_vqgan
from dalle1.importers.yttm import read_yttm
from dalle1.model.masks import CONV_REACH, MaskKind, joint_mask, layer_masks
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.model_card import ModelInfo
from dalle1.sampling.generation import GenerationConfig
from dalle1.text.bpe import Tokenizer
from dalle1.text.format import TextFormat

INFO = ModelInfo(license="apache-2.0", source="https://github.com/ai-forever/ru-dalle")
GENERATION = GenerationConfig(top_k=2048, top_p=0.995)
HEADS = {1024: 16, 2048: 16, 2560: 32, 3840: 60}
"""Width → attention heads of the published models; shapes do not tell them."""
CODES = 8192
"""Codes of their image tokenizers; RuDOLPH's tables have rows of special tokens after them."""
BOS, EOS, PAD = 2, 3, 0
TEXT_TO_IMAGE = 2
"""Index among RuDOLPH's special tokens of the one that asks for an image of a caption."""

_LAYER = (  # theirs → ours, below transformer.layers.{i} and layers.{i}
    ("input_layernorm", "attention.norm"),
    ("before_first_addition_layernorm", "attention.out_norm"),
    ("attention.query_key_value", "attention.branch.qkv"),
    ("attention.dense", "attention.branch.out"),
    ("post_attention_layernorm", "mlp.norm"),
    ("before_second_addition_layernorm", "mlp.out_norm"),
    ("mlp.dense_h_to_4h", "mlp.branch.up"),
    ("mlp.dense_4h_to_h", "mlp.branch.down"),
)


def load_transformer(path: str | Path, heads: int | None = None, codes: int = CODES) -> Transformer:
    """Load a transformer of ru-dalle (version 3) or RuDOLPH.

    Args:
        heads: attention heads; None looks them up by the width of the published models.
        codes: codes of the image tokenizer.

    Raises: ValueError where the file holds no such model, or one of ru-dalle's version 2.
    """
    tensors = Foreign(read_state_dict(path), "text_embeddings.weight", path)
    with one_error(path):
        config = read_sizes(tensors, heads, codes)
        state = _renamed(tensors, config)
    model = build_transformer(config, state, path)
    tensors.warn_of_unread("transformer.row_mask", "transformer.col_mask", "r_text_pos_embeddings")
    return model


def read_sizes(tensors: Foreign, heads: int | None, codes: int) -> TransformerConfig:
    """Return the config that shapes and masks determine."""
    text, row = tensors["text_embeddings.weight"], tensors["image_row_embeddings.weight"]
    width, length, grid = text.shape[1], len(tensors[_text_positions(tensors)]) - 1, len(row)
    if heads is None and width not in HEADS:
        raise ValueError(
            f"{tensors.path} is {width} wide, expected one of {', '.join(map(str, HEADS))}, as the "
            "published models are; add --heads"
        )
    depth = tensors.count("transformer.layers.")
    return TransformerConfig(
        text_vocab=len(text) - length,
        text_len=length,
        width=width,
        depth=depth,
        heads=heads or HEADS[width],
        image_start="none",
        conv_wrap=False,
        masks=_masks(tensors, depth, length, grid),
        sandwich=True,
        head_norm=True,
        mlp="gelu-tanh",
        codebook_size=codes,
        grid_size=grid,
    )


def _text_positions(tensors: Foreign) -> str:
    prefix = "l_" if "l_text_pos_embeddings.weight" in tensors else ""  # RuDOLPH's left side
    return f"{prefix}text_pos_embeddings.weight"


def _masks(tensors: Foreign, depth: int, length: int, grid: int) -> tuple[MaskKind, ...] | None:
    """Return RuDOLPH's mask of each layer; None for ru-dalle, whose masks are the paper's."""
    kinds: dict[str, MaskKind] = {}
    last = "transformer.last_conv_mask"
    is_rudolph = last in tensors or _text_positions(tensors).startswith("l_")
    if not is_rudolph and "transformer.conv_mask" not in tensors:
        warnings.warn(
            f"{tensors.path} has no conv_mask, which tells versions of ru-dalle apart; it is read "
            "as version 3",
            stacklevel=2,
        )
        return None
    for name in ("conv_mask", "last_conv_mask") if is_rudolph else ("conv_mask",):
        stored, end = tensors[f"transformer.{name}"], length + grid**2
        if stored.ndim != 2 or min(stored.shape) < end:
            raise ValueError(
                f"{tensors.path} has a {name} {tuple(stored.shape)}, expected at least {end} × "
                f"{end}; use the file as released"
            )
        found = stored[:end, :end].bool()  # RuDOLPH's streams have more text after the image
        matches = [
            kind
            for kind in CONV_REACH
            if torch.equal(found, joint_mask(kind, length, grid, conv_wrap=False))
        ]
        if not matches:
            raise ValueError(
                f"{tensors.path} has the convolutional mask of ru-dalle's version 2 (Malevich_v2, "
                "Emojich) or another one, which is not supported; use a model of version 3"
            )
        # In a small grid, kernels may be alike: ru-dalle's is 11 × 11, RuDOLPH's 7 × 7 or 9 × 9.
        kinds[name] = matches[0]
    if not is_rudolph:
        return None
    masks = layer_masks(depth)
    masks[3::4] = [kinds["conv_mask"]] * len(masks[3::4])
    masks[-1] = "column" if (depth - 2) % 4 == 0 else kinds["last_conv_mask"]
    return tuple(masks)


def _renamed(tensors: Foreign, config: TransformerConfig) -> dict[str, Tensor]:
    """Return the tensors under our names."""
    names = {
        "row.weight": "image_row_embeddings.weight",
        "column.weight": "image_col_embeddings.weight",
        **{f"norm.{kind}": f"transformer.final_layernorm.{kind}" for kind in KINDS},
        **{f"head_norm.{kind}": f"to_logits.0.{kind}" for kind in KINDS},
    }
    for i in range(config.depth):
        for theirs, ours in _LAYER:
            for kind in KINDS:
                names[f"layers.{i}.{ours}.{kind}"] = f"transformer.layers.{i}.{theirs}.{kind}"
    tokens, codes = config.text_vocab + config.text_len, config.codebook_size
    state = {ours: tensors[theirs] for ours, theirs in names.items()}
    for kind in KINDS:
        heads = tensors[f"to_logits.1.{kind}"]
        state[f"text_head.{kind}"] = heads[:tokens]
        state[f"image_head.{kind}"] = heads[tokens : tokens + codes]
    return (
        state
        | {  # the rows of the start tokens are never read
            "text_embedding.weight": rows(tensors["text_embeddings.weight"], tokens + 1),
            "image_embedding.weight": rows(tensors["image_embeddings.weight"][:codes], codes + 1),
            "text_position.weight": tensors[_text_positions(tensors)][: config.text_len],
        }
    )


def load_tokenizer(path: str | Path, text_vocab: int) -> Tokenizer:
    """Load their vocabulary, a file of youtokentome, for a model with `text_vocab` ids.

    RuDOLPHs with special tokens, which follow those of the file, begin a caption with a second one.
    """
    bpe = read_yttm(path)
    size = bpe.get_vocab_size()
    bos = (BOS, size + TEXT_TO_IMAGE) if text_vocab > size + TEXT_TO_IMAGE else (BOS,)
    if bpe.get_vocab_size() > text_vocab:
        raise ValueError(
            f"{path} has {bpe.get_vocab_size()} tokens, the transformer {text_vocab}; use the "
            "vocabulary that it was trained with"
        )
    return Tokenizer(
        bpe,
        format=TextFormat(
            clean="lower",
            bos=bos,
            eos=(EOS,),
            pad_id=PAD,
            fills_all=True,
            vocab_size=text_vocab,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ImportConfig(ModelOptions):
    """Options of `dalle1 import rudalle`."""

    transformer: tyro.conf.Positional[Path]
    """The published transformer: pytorch_model_v3.bin or pytorch_model.bin."""
    vqgan: tyro.conf.Positional[Path]
    """The published image tokenizer: vqgan.gumbelf8-sber.model.ckpt, or the one with dwt."""
    vocabulary: tyro.conf.Positional[Path]
    """The published vocabulary: bpe.model."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ImportConfig, args, __doc__.splitlines()[0])
        convert(config, INFO, GENERATION)


def convert(config: ImportConfig, info: ModelInfo, generation: GenerationConfig) -> None:
    """Write the model folder."""
    config.check()
    vqgan = load_vqgan(config.vqgan)
    transformer = load_transformer(config.transformer, config.heads, vqgan.codebook_size)
    tokenizer = load_tokenizer(config.vocabulary, transformer.config.text_vocab)
    config.write(for_grid(vqgan, transformer), transformer, tokenizer, info, generation)
