"""Parameter names of earlier versions, so that their files and checkpoints stay readable."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

RENAMED = (
    # Norms and branches lay side by side in a layer before each pair became a `Residual`.
    (r"\b(layers\.\d+)\.(attention|mlp)_norm\.", r"\1.\2.norm."),
    (r"\b(layers\.\d+\.attention)\.(qkv|out|query_norm|key_norm)\.", r"\1.branch.\2."),
    (r"\b(layers\.\d+\.mlp)\.(up|down)\.", r"\1.branch.\2."),
)
"""(pattern, replacement) of each name that changed."""


def upgrade_key(name: str) -> str:
    """Return the present name of a parameter, whatever its prefix and the version it is from."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def upgrade_state_dict(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Rename the keys in place; registered with `register_load_state_dict_pre_hook`."""
    for name in list(state):
        state[upgrade_key(name)] = state.pop(name)
