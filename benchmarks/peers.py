"""The peers that ours is measured beside: `make bench-peers` installs them, without what they pull.

DALLE-pytorch imports much that is not needed to build and train its models: torchvision, taming
transformers, tokenizers of its own. Empty modules stand in for those.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

from torch import nn

from dalle1.model.transformer import TransformerConfig

UNUSED = {
    "omegaconf": ("OmegaConf",),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "youtokentome": (),
    "pkg_resources": ("get_distribution",),
    "ftfy": (),
    "torchvision": ("transforms",),
    "requests": (),
}


def _stand_in(name: str, attributes: tuple[str, ...] = ()) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for attribute in attributes:
        setattr(module, attribute, lambda *_: SimpleNamespace(version="1.6.6"))
    sys.modules[name] = module


def dalle_pytorch() -> ModuleType:
    """Import DALLE-pytorch 1.6.6; its version is the last on PyPI."""
    before = set(sys.modules)
    for name, attributes in UNUSED.items():
        parts = name.split(".")
        missing = importlib.util.find_spec(parts[0]) is None
        for i in range(1, len(parts) if missing else 0):
            _stand_in(".".join(parts[:i]))
        if missing or len(parts) > 1:  # taming's own needs Lightning
            _stand_in(name, attributes)
    try:
        import dalle_pytorch
    except ImportError as error:
        raise SystemExit(f"{error}: run `make bench-peers`, or leave the peers out") from error
    finally:  # other packages look for them, too
        for name in UNUSED:
            for module in {name, name.partition(".")[0]} - before:
                if getattr(sys.modules.get(module), "__path__", None) == []:
                    del sys.modules[module]
    return dalle_pytorch


def dalle_pytorch_model(config: TransformerConfig) -> tuple[ModuleType, nn.Module]:
    """Return DALLE-pytorch's module and its transformer of that size: row, column, row, row."""
    package = dalle_pytorch()
    vae = package.DiscreteVAE(
        image_size=8 * config.grid_size,
        num_layers=3,
        num_tokens=config.codebook_size,
        hidden_dim=8,
        codebook_dim=8,
    )
    model = package.DALLE(
        dim=config.width,
        vae=vae,
        num_text_tokens=config.text_vocab,
        text_seq_len=config.text_len,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.head_size,
        attn_types=("axial_row", "axial_col", "axial_row", "axial_row"),
    )
    return package.dalle_pytorch, model
