"""Commands in the documentation parse, links resolve, and the README stays short."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dalle1.cli import SUBCOMMANDS
from dalle1.image_tokenizer import image_tokenizer_file
from dalle1.model.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "dalle1" / "bundled").rglob("README.md"))
SCRIPTS = {
    "train_dvae.py": "train dvae",
    "train_transformer.py": "train transformer",
    "train_clip.py": "train clip",
    "sample.py": "sample",
    "evaluate.py": "evaluate",
}
GUIDE = ROOT / "docs" / "train-your-own.md"


def commands_in(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in the page's shell blocks."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


COMMANDS = [(page.name, words) for page in PAGES for words in commands_in(page)]


class Parsed(BaseException):
    """Carries the options that a command parsed, and keeps it from running."""


def parsed(name: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the options that a subcommand reads from its arguments."""
    module = import_module(SUBCOMMANDS[name][0])
    for function in ("parse", "parse_preset"):
        if (parse := getattr(module, function, None)) is not None:

            def stop(*inputs: Any, parse: Any = parse, **options: Any) -> Any:
                raise Parsed(parse(*inputs, **options))

            monkeypatch.setattr(module, function, stop)
    with pytest.raises(Parsed) as caught:
        module.main(args)
    return caught.value.args[0]


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what a command of the documentation is parsed to; fail where it is not understood."""
    program, *rest = words
    if program == "torchrun":
        rest = rest[rest.index("--nproc-per-node") + 2 :]
        program = "python"
    if program in ("python", "python3") and rest[0] == "-m":
        program, rest = rest[1], rest[2:]
    if program == "dalle1":
        length = 2 if " ".join(rest[:2]) in SUBCOMMANDS else 1
        return parsed(" ".join(rest[:length]), rest[length:], monkeypatch)
    if program == "python":
        script, *args = rest
        if script in SCRIPTS:
            return parsed(SCRIPTS[script], args, monkeypatch)
        if script == "recipes/photographs.py":
            return runpy.run_path(str(ROOT / script))["parse"](args)
        assert (ROOT / script).is_file(), script
        return None
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
        return None
    if program in ("sbatch", "bash"):
        assert (ROOT / rest[0]).is_file()
        return None
    assert program in ("pip", "venv", "."), f"{program}: the test does not know how to check it"
    return None


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_command_parses(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = check(words, monkeypatch)
    if page == GUIDE.name and options is not None:
        assert options.out.parts[0] == "runs"


def test_the_notebooks_command_fine_tunes_the_bundled_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8")
    (command,) = re.findall(r"`(dalle1 train [^`]*)`", text)
    options = check(command.split(), monkeypatch)
    assert options.lora == 8
    assert Transformer.config_of(options.init).grid_size == 32
    assert image_tokenizer_file(options.dvae).is_file()


FLAGGED = [words for _, words in COMMANDS if words[0] == "dalle1" and words[-1] != "PROMPT"]


@pytest.mark.parametrize("words", FLAGGED, ids=" ".join)
def test_an_unknown_flag_is_noticed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, ValueError)):
        check([*words, "--no-such-flag", "1"], monkeypatch)


def test_the_guide_leads_from_images_to_samples() -> None:
    names = [" ".join(words[1:3]) for words in commands_in(GUIDE) if words[0] == "dalle1"]
    steps = ["check", "train dvae", "evaluate dvae", "encode", "train transformer", "train clip"]
    order = [next(i for i, name in enumerate(names) if name.startswith(step)) for step in steps]
    assert order == sorted(order)
    assert any(name.startswith("sample") for name in names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []


def test_the_readme_lists_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    assert [page.name for page in pages if f"](docs/{page.name})" not in readme] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "figures").glob("*.py")), ids=lambda path: path.name
)
def test_figures_import_what_exists(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    runpy.run_path(str(path), run_name="figure")
