"""Sources as the architecture's rules read them, and the rules that need no table of layers."""

import ast
import graphlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from launch import ROOT

DVAE_MAY_IMPORT = {"dvae", "torch", "einops", "numpy", "safetensors"} | sys.stdlib_module_names
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc"}
NOT_SOURCE = {"runs", "outputs", "build", "dist", "wandb", "__pycache__"}
MAX_FUNCTION_LINES = 50
MAX_FILE_LINES = 400

# Files, and functions as FILE:NAME, that are still longer than that. Remove each once it is split.
TOO_LONG: set[str] = set()


class Import(NamedTuple):
    target: str
    line: int
    is_global: bool  # False inside a function; True under `if TYPE_CHECKING:`


def source_paths(root: Path) -> Iterator[Path]:
    """Yield every folder and file of the tree, without what is hidden or made by a tool."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in NOT_SOURCE
            and not name.startswith(".")
            and not name.endswith(".egg-info")
        )
        yield from (Path(folder, name) for name in [*folders, *sorted(files)])


def modules(root: Path) -> dict[str, Path]:
    """Return the packages' modules and the top-level scripts, by dotted name."""
    paths = [*root.glob("*.py"), *root.glob("dvae/**/*.py"), *root.glob("dalle[12]/**/*.py")]
    dotted = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in sorted(dotted.items())}


def imports_of(name: str, known: dict[str, Path]) -> Iterator[Import]:
    """Yield what a module imports, wherever in the file, as absolute dotted names."""
    is_package = known[name].name == "__init__.py"

    def targets(node: ast.AST) -> list[str]:
        match node:
            case ast.Import():
                return [alias.name for alias in node.names]
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    parts = name.split(".")
                    kept = parts[: len(parts) - node.level + is_package]
                    base = ".".join([*kept, base] if base else kept)
                # `from package import name` means the module package.name where there is one.
                full = [f"{base}.{alias.name}" for alias in node.names]
                return [module if module in known else base for module in full]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                return [module]
        return []

    def visit(node: ast.AST, is_global: bool) -> Iterator[Import]:
        for target in targets(node):
            yield Import(target, getattr(node, "lineno", 0), is_global)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            is_global = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_global)

    yield from visit(ast.parse(known[name].read_text(encoding="utf-8")), True)


def check_packages(root: Path) -> list[str]:
    """Every folder of modules is a package; without its __init__.py it would not be installed."""
    folders = {path.parent for path in modules(root).values()} - {root}
    return [
        f"{folder.relative_to(root)} has no __init__.py"
        for folder in sorted(folders)
        if not (folder / "__init__.py").exists()
    ]


def check_cycles(root: Path) -> list[str]:
    """No modules import each other in a circle, imports for type checking included."""
    known = modules(root)
    graph = {
        name: {
            target
            for target, _, is_global in imports_of(name, known)
            if is_global and target in known
        }
        for name in known
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["modules import each other in a circle: " + " → ".join(reversed(error.args[1]))]
    return []


def check_dvae_stands_alone(root: Path) -> list[str]:
    """Stage 1 imports only torch, einops, numpy, safetensors and the storage of models."""
    known = modules(root)
    return [
        f"{name}:{line} imports {target}, but dvae stands alone"
        for name in known
        if name.split(".")[0] == "dvae"
        for target, line, _ in imports_of(name, known)
        if target.split(".")[0] not in DVAE_MAY_IMPORT and target != "dalle1.storage"
    ]


def check_toybox_stands_alone(root: Path) -> list[str]:
    """Toybox imports nothing else of dalle1."""
    known = modules(root)
    return [
        f"{name}:{line} imports {target}, but dalle1.toybox stands alone"
        for name in known
        if name.startswith("dalle1.toybox")
        for target, line, _ in imports_of(name, known)
        if target.split(".")[0] in ("dalle1", "dvae") and not target.startswith("dalle1.toybox")
    ]


def check_deepspeed_has_one_door(root: Path) -> list[str]:
    """Only dalle1/training/engines/deepspeed.py imports deepspeed."""
    known = modules(root)
    return [
        f"{name}:{line} imports deepspeed: only dalle1.training.engines.deepspeed may"
        for name in known
        if name != "dalle1.training.engines.deepspeed"
        for target, line, _ in imports_of(name, known)
        if target.split(".")[0] == "deepspeed"
    ]


def check_json_has_one_door(root: Path) -> list[str]:
    """Only dalle1/json_files.py parses JSON: it turns every mistake into one clear line."""
    return [
        f"{name}:{node.lineno} calls json.{node.attr}: use dalle1.json_files.parse_json"
        for name, path in modules(root).items()
        if name != "dalle1.json_files"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("load", "loads", "JSONDecoder")
        if isinstance(node.value, ast.Name) and node.value.id == "json"
    ]


def check_names(root: Path) -> list[str]:
    """Names describe their content."""
    return [
        f"{path.relative_to(root)}: name it after what is inside"
        for path in source_paths(root)
        if path.name.split(".")[0].lower() in VAGUE_NAMES
    ]


def check_sizes(root: Path) -> list[str]:
    """A file is read in one sitting, and a function (outside the tests) fits on a screen or so."""
    long: dict[str, str] = {}
    for path in source_paths(root):
        where = path.relative_to(root)
        if path.suffix != ".py" or path.is_dir() or where.parts[0] == "tests":
            continue
        source, name = path.read_text(encoding="utf-8"), where.as_posix()
        lines = len(source.splitlines())
        if lines > MAX_FILE_LINES and where.parts[:2] != ("dalle1", "toybox"):
            long[name] = f"{name} has {lines} lines, more than {MAX_FILE_LINES}: split it"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name}:{node.name}"] = (
                        f"{name}:{node.lineno} {node.name} has {lines} lines,"
                        f" more than {MAX_FUNCTION_LINES}: split it"
                    )
    known = TOO_LONG if root == ROOT else set()
    split = [f"{name} is short enough: remove it from TOO_LONG" for name in known - long.keys()]
    return [message for name, message in long.items() if name not in known] + split
