"""Import the networks of published packages whose own `__init__` no longer imports."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest


def import_original(module: str, *bare: str) -> types.ModuleType:
    """Return a module of a package, without running the `__init__` of the packages `bare`.

    Skip the test where the package is not installed.
    """
    root = module.split(".")[0]
    spec = importlib.util.find_spec(root) if root not in sys.modules else sys.modules[root].__spec__
    if spec is None:
        pytest.skip(f"needs the package {root}; `make test` installs it")
    for name in bare:
        if name not in sys.modules:
            package = types.ModuleType(name)
            folder = (spec.submodule_search_locations or [""])[0]
            package.__path__ = ["/".join([folder, *name.split(".")[1:]])]
            package.__spec__ = spec
            sys.modules[name] = package
    return importlib.import_module(module)
