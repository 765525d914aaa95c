"""Plot which packages import which: python docs/figures/import_graph.py

Reads every import of `dalle1`, `dalle2` and `dvae`, those inside functions included. An arrow
points from a package to one that it imports. Arrows that follow from others are omitted.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
Graph = dict[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a module's file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """Return the node of a module: dvae, dalle2, or a package or single module of dalle1."""
    parts = module.split(".")
    if parts[0] == "dalle2":  # its tasks stand above dalle1's, which stand above the rest of it
        return "dalle2.tasks" if parts[1:2] == ["tasks"] else "dalle2"
    if parts[0] == "dvae" or len(parts) == 1:
        return parts[0]
    return parts[1]


def imported(source: str, name: str, is_package: bool) -> Iterator[str]:
    """Yield the absolute names that a module imports; `from a import b` yields a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                parts = name.split(".")
                base = [*parts[: len(parts) - node.level + is_package], *base]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def package_graph(root: Path) -> Graph:
    """Return package → the packages that it imports."""
    paths = [*root.glob("dvae/**/*.py"), *root.glob("dalle[12]/**/*.py")]
    paths = [path for path in paths if path.stem != "__main__"]
    modules = {module_name(path, root): path for path in paths}
    graph: Graph = {package_of(name): set() for name in modules}
    for name, path in modules.items():
        for target in imported(path.read_text(encoding="utf-8"), name, path.stem == "__init__"):
            known = target if target in modules else target.rpartition(".")[0]
            if known in modules and package_of(known) != package_of(name):
                graph[package_of(name)].add(package_of(known))
    return graph


def levels(graph: Graph) -> dict[str, int]:
    """Return each package's level: 0 imports nothing, others are above all that they import.

    Raises: graphlib.CycleError where packages import each other in a circle.
    """
    found: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        found[name] = max((found[target] + 1 for target in graph[name]), default=0)
    return found


def reduced(graph: Graph) -> Graph:
    """Return the graph without the edges that follow from others."""

    def reach(name: str) -> set[str]:
        return graph[name].union(*(reach(target) for target in graph[name]))

    return {
        name: targets - set().union(*(reach(target) for target in targets))
        for name, targets in graph.items()
    }


def bends(graph: Graph, level: dict[str, int]) -> Graph:
    """Return the graph with a bend, named "user>target>level", on every level an arrow crosses."""
    bent: Graph = {name: set() for name in graph}
    for name, targets in graph.items():
        for target in targets:
            user = name
            for height in range(level[name] - 1, level[target], -1):
                bend = f"{name}>{target}>{height}"
                bent[user].add(bend)
                bent[bend], user = set(), bend
            bent[user].add(target)
    return bent


def positions(graph: Graph) -> dict[str, tuple[float, float]]:
    """Return x, y of each node; within a level, nodes are near those that they are linked to."""
    level = levels(graph)
    rows: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for name in sorted(graph):
        rows[level[name]].append(name)
    users = {name: {user for user in graph if name in graph[user]} for name in graph}
    x: dict[str, float] = {}
    for row in rows:
        x.update({name: (i + 0.5) / len(row) for i, name in enumerate(row)})
    for _ in range(30):  # sweeps up and down sort each level by the mean of its neighbours
        for links, order in ((graph, rows), (users, rows[::-1])):
            for row in order:
                near = {n: [x[t] for t in links[n]] or [x[n]] for n in row}
                row.sort(key=lambda n: sum(near[n]) / len(near[n]))
                x.update({name: (i + 0.5) / len(row) for i, name in enumerate(row)})
    return {name: (x[name], level[name]) for name in graph}


def plot(graph: Graph, path: Path) -> None:
    """Plot the packages in levels, the lowest at the bottom."""
    edges = bends(reduced(graph), levels(graph))
    where = positions(edges)
    height = max(y for _, y in where.values())
    figure, axes = plt.subplots(figsize=(11, 0.95 * height + 1), layout="constrained")
    box = {"boxstyle": "round,pad=0.45", "facecolor": "#eff6ff", "edgecolor": "#1d4ed8"}
    centre = {"ha": "center", "va": "center", "fontsize": 12, "bbox": box, "zorder": 3}
    boxes = {name: axes.text(*where[name], name, **centre).get_bbox_patch() for name in graph}
    for name, targets in edges.items():
        for target in targets:
            style = "-|>" if target in graph else "-"
            arrow = {"arrowstyle": style, "color": "#64748b", "shrinkA": 0, "shrinkB": 0}
            arrow |= {"patchA": boxes.get(name), "patchB": boxes.get(target), "linewidth": 1.2}
            axes.annotate("", where[target], where[name], arrowprops=arrow, zorder=2)
    axes.set(xlim=(0, 1), ylim=(-0.4, height + 0.4))
    axes.axis("off")
    figure.savefig(path, dpi=80)


def main() -> None:
    path = ROOT / "docs" / "import-graph.png"
    plot(package_graph(ROOT), path)
    print(path)


if __name__ == "__main__":
    main()
