"""The hashes in locks/ belong to the versions in constraints.txt, and every package has some."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)(.*?)(?=^\S|\Z)", re.M | re.S)


def name_of(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version, _ in PIN.findall(path.read_text()):
        found.setdefault(name_of(name), set()).add(version)
    return found


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_locked_versions_are_those_of_the_constraints(path: Path) -> None:
    known = pins(ROOT / "constraints.txt")
    other = {
        name: versions
        for name, versions in pins(path).items()
        if name in known and not versions <= known[name]
    }
    assert other == {}, "run make lock"


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_locked_package_has_hashes(path: Path) -> None:
    without = [x for x, _, rest in PIN.findall(path.read_text()) if "--hash=sha256:" not in rest]
    assert without == []


def test_every_direct_dependency_but_torch_is_locked() -> None:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[0]
    direct = {name_of(name) for name in re.findall(r'^    "([a-z0-9-]+)>=', text, re.M)}
    assert len(direct) > 5
    assert direct - {*pins(ROOT / "locks/runtime.txt")} == {"torch"}
    assert {path.stem for path in LOCKS} == {"compared", "dev", "runtime"}
