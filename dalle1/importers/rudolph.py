"""Convert RuDOLPH's models (350M, 1.3B, 2.7B), to sample images of captions.

    dalle1 import rudolph pytorch_model.bin vqgan.gumbelf8-sber.model.ckpt bpe.model --out DIR

See `dalle1.importers.rudalle`. The text after the image, which RuDOLPH can read and write too, is
not converted.
"""

from __future__ import annotations

from collections.abc import Sequence

from dalle1.console import one_line_errors, parse
from dalle1.importers.rudalle import ImportConfig, convert
from dalle1.model_card import ModelInfo
from dalle1.sampling.generation import GenerationConfig

INFO = ModelInfo(license="apache-2.0", source="https://github.com/ai-forever/ru-dolph")

GENERATION = GenerationConfig(top_k=768, top_p=0.99)


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        convert(parse(ImportConfig, args, __doc__.splitlines()[0]), INFO, GENERATION)
