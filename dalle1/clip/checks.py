"""Checks of a CLIP before it scores anything: its files, its tokenizer, its image processor.

A CLIP without its tokenizer loads and embeds all captions alike: it would rank at random.
`clip` is a `dalle1.clip.Clip` everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from dalle1.model_files import refuse_pointer
from dalle1.tensor_files import INDEX_SUFFIX, tensor_files

CAPTIONS = ("a red cube", "seven blue zebras", "the sea at night")
SHAPES = ((8, 8), (40, 3), (3, 40))
"""Width and height of the images that the processor is checked with."""
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


def check_weights(folder: Path) -> None:
    """Raise a ValueError for pointers of Git LFS, and for an index of files in other folders."""
    for path in folder.iterdir():
        if path.is_file():
            refuse_pointer(path)
        if path.name.endswith((f".safetensors{INDEX_SUFFIX}", f".bin{INDEX_SUFFIX}")):
            tensor_files(folder / path.name.removesuffix(INDEX_SUFFIX))


def check_files(folder: Path) -> None:
    """Raise a ValueError that names the files that a CLIP's folder misses."""
    names = {path.name for path in folder.iterdir()}
    has_vocabulary = bool(names & {"tokenizer.json", *SENTENCEPIECE})
    missing = {
        "config.json": "config.json" in names,
        "tokenizer.json": has_vocabulary or {"vocab.json", "merges.txt"} <= names,
        "preprocessor_config.json": bool(
            names & {"preprocessor_config.json", "processor_config.json"}
        ),
    }
    if absent := [name for name, found in missing.items() if not found]:
        raise ValueError(
            f"the CLIP in {folder} has no {' and no '.join(absent)}; copy all files of its folder"
        )
    if "tokenizer.json" not in names and "vocab.json" not in names:
        try:
            import sentencepiece  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"the tokenizer of the CLIP in {folder} needs sentencepiece; run pip install "
                "sentencepiece"
            ) from error


class UnfitClip(ValueError):
    """The tokenizer or image processor of a CLIP does not belong to its model."""


def check_clip(clip: Any, name: str) -> None:
    """Raise a ValueError unless captions get different tokens, and images are scored."""
    rows = [clip.tokenize([caption], warn=False)["input_ids"][0].tolist() for caption in CAPTIONS]
    if len(set(map(tuple, rows))) < len(rows):
        raise UnfitClip(
            f"the tokenizer of the CLIP in {name} encodes different captions alike; copy the "
            "tokenizer files that belong to the model"
        )
    config = clip.model.config.text_config
    if (largest := max(map(max, rows))) >= config.vocab_size:
        raise UnfitClip(
            f"the tokenizer of the CLIP in {name} has token {largest}, expected less than its "
            f"model's {config.vocab_size}; copy the tokenizer files that belong to the model"
        )
    is_siglip, end = clip.model.config.model_type == "siglip", config.eos_token_id
    # transformers pools at the end token; for an end of 2, as in old files, at the largest.
    if not is_siglip and end != 2 and not all(end in row for row in rows):
        raise UnfitClip(
            f"the tokenizer of the CLIP in {name} writes no end token {end}; copy the tokenizer "
            "files that belong to the model"
        )
    size = (clip.image_size, clip.image_size)
    for shape in SHAPES:
        found = tuple(clip.preprocess([Image.new("RGB", shape)]).shape[-2:])
        if found != size:
            raise UnfitClip(
                f"the image processor of the CLIP in {name} turns {shape[0]} × {shape[1]} pixels "
                f"into {found[1]} × {found[0]}, expected {size[0]} × {size[1]} as its model; "
                "replace its preprocessor_config.json"
            )
    gradient = Image.linear_gradient("L").convert("RGB")
    clip.embed_images([gradient])  # a damaged config, or nan in weights, fails here
    clip.embed_text(["a"])


def lower_cases(clip: Any) -> bool:
    """Whether captions are lower-cased: SigLIP 2 was trained so, its tokenizer may not do it."""
    tokenizer = clip.tokenizer
    asked = tokenizer.init_kwargs.get("do_lower_case", False)
    is_gemma = type(tokenizer).__name__.startswith("Gemma")
    return clip.model.config.model_type == "siglip" and bool(asked or is_gemma)
