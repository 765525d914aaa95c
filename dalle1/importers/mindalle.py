"""Convert minDALL-E (kakaobrain), 1.3B parameters on 256 codes.

    dalle1 import mindalle 1.3B --out runs/mindalle

Its stream has no start tokens, one embedding for each code, full attention and the exact GELU.
Source: kakaobrain/minDALL-E dalle/models/stage2/{transformer,layers}.py, dalle/models/tokenizer.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import tyro
from tokenizers.implementations import CharBPETokenizer
from torch import Tensor

from dalle1.console import one_line_errors, parse
from dalle1.importers.checkpoint import read_state_dict
from dalle1.importers.command import ModelOptions, for_grid
from dalle1.importers.state_dict import KINDS, Foreign, build_transformer, one_error, rows
from dalle1.importers.vqgan import load_vqgan
from dalle1.model.transformer import Transformer, TransformerConfig
from dalle1.model_card import ModelInfo
from dalle1.sampling.generation import GenerationConfig
from dalle1.text.bpe import Tokenizer
from dalle1.text.format import TextFormat

INFO = ModelInfo(license="cc-by-nc-sa-4.0", source="https://github.com/kakaobrain/minDALL-E")
GENERATION = GenerationConfig(top_k=256)
FILES = (
    "stage2_last.ckpt",
    "stage1_last.ckpt",
    "tokenizer/bpe-16k-vocab.json",
    "tokenizer/bpe-16k-merges.txt",
)
"""Files of the published folder that are read."""
HEAD_SIZE = 64
"""Channels of a head in the published model; shapes do not tell it."""
PAD, UNKNOWN = "[PAD]", "[UNK]"
UNREACHABLE = -1e4
"""Bias of a token that is never sampled."""

_LAYER = (  # theirs → ours, below blocks.{i} and layers.{i}
    ("ln1", "attention.norm"),
    ("attn.proj", "attention.branch.out"),
    ("ln2", "mlp.norm"),
    ("mlp.0", "mlp.branch.up"),
    ("mlp.2", "mlp.branch.down"),
)


def load_transformer(path: str | Path, pad: int, heads: int | None = None) -> Transformer:
    """Load the transformer of minDALL-E.

    Args:
        pad: id of its padding token.
        heads: attention heads; None: one for each 64 channels.

    Raises: ValueError where the file holds no such model.
    """
    tensors = Foreign(read_state_dict(path), "tok_emb_txt.weight", path)
    with one_error(path):
        config = read_sizes(tensors, heads)
        state = _renamed(tensors, config, pad)
    model = build_transformer(config, state, path)
    tensors.warn_of_unread()
    return model


def read_sizes(tensors: Foreign, heads: int | None) -> TransformerConfig:
    """Return the config that shapes determine."""
    text, positions = tensors["tok_emb_txt.weight"], tensors["pos_emb_img.weight"]
    return TransformerConfig(
        text_vocab=len(text),
        text_len=len(tensors["pos_emb_txt.weight"]),
        width=text.shape[1],
        depth=tensors.count("blocks."),
        heads=heads or max(1, text.shape[1] // HEAD_SIZE),
        image_start="none",
        pad_targets=False,
        attention="full",
        positions="flat",
        mlp="gelu-erf",
        codebook_size=len(tensors["tok_emb_img.weight"]),
        grid_size=math.isqrt(len(positions)),
    )


def _renamed(tensors: Foreign, config: TransformerConfig, pad: int) -> dict[str, Tensor]:
    """Return the tensors under our names.

    Its padding is one token, ours is one for each position: all of these are read as its token, and
    none is predicted; `pad_targets` leaves them out of the loss.
    """
    names = {
        "text_position.weight": "pos_emb_txt.weight",
        "image_position.weight": "pos_emb_img.weight",
        "image_head.weight": "head_img.weight",
    }
    names |= {f"norm.{kind}": f"ln_f.{kind}" for kind in KINDS}
    for i in range(config.depth):
        for theirs, ours in _LAYER:
            names |= {f"layers.{i}.{ours}.{kind}": f"blocks.{i}.{theirs}.{kind}" for kind in KINDS}
    state = {ours: tensors[theirs] for ours, theirs in names.items()}
    for i in range(config.depth):
        for kind in KINDS:
            parts = [f"blocks.{i}.attn.{part}.{kind}" for part in ("query", "key", "value")]
            state[f"layers.{i}.attention.branch.qkv.{kind}"] = torch.cat(
                [tensors[part] for part in parts]
            )
    text, head = tensors["tok_emb_txt.weight"], tensors["head_txt.weight"]
    tokens = config.text_vocab + config.text_len
    bias = head.new_zeros(tokens)
    bias[config.text_vocab :] = UNREACHABLE
    pads = text[pad].expand(config.text_len, -1)
    return state | {  # the rows of the start tokens are never read
        "text_embedding.weight": rows(torch.cat([text, pads]), tokens + 1),
        "image_embedding.weight": rows(tensors["tok_emb_img.weight"], config.codebook_size + 1),
        "text_head.weight": rows(head, tokens),
        "text_head.bias": bias,
        "image_head.bias": head.new_zeros(config.codebook_size),
    }


def load_tokenizer(vocabulary: str | Path, merges: str | Path) -> Tokenizer:
    """Load its vocabulary, a BPE of characters with lower-case captions and no ends."""
    try:
        char_bpe = CharBPETokenizer.from_file(
            str(vocabulary), str(merges), unk_token=UNKNOWN, lowercase=True
        )
        bpe = tokenizers.Tokenizer.from_str(char_bpe._tokenizer.to_str())
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(
            f"{vocabulary} and {merges} are no vocabulary ({str(error).splitlines()[0][:80]}); "
            "expected those of minDALL-E"
        ) from error
    pad = bpe.token_to_id(PAD)
    if pad is None:
        raise ValueError(f"{vocabulary} has no token {PAD}, expected that of minDALL-E")
    return Tokenizer(bpe, format=TextFormat(pad_id=pad, fills_all=True))


@dataclass(frozen=True, kw_only=True)
class ImportConfig(ModelOptions):
    """Options of `dalle1 import mindalle`."""

    folder: tyro.conf.Positional[Path]
    """The published folder, 1.3B: stage1_last.ckpt, stage2_last.ckpt and tokenizer/."""


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        config = parse(ImportConfig, args, __doc__.splitlines()[0])
        config.check()
        transformer_file, vqgan_file, vocabulary, merges = (config.folder / name for name in FILES)
        for path in (transformer_file, vqgan_file, vocabulary, merges):
            if not path.is_file():
                raise ValueError(
                    f"{config.folder} has no file {path.relative_to(config.folder)}; expected the "
                    f"published folder with {', '.join(FILES)}"
                )
        tokenizer = load_tokenizer(vocabulary, merges)
        assert tokenizer.format.pad_id is not None
        transformer = load_transformer(transformer_file, tokenizer.format.pad_id, config.heads)
        vqgan = for_grid(load_vqgan(vqgan_file), transformer)
        config.write(vqgan, transformer, tokenizer, INFO, GENERATION)
