"""Print a script that completes the subcommands and flags of `dalle1` in bash or zsh.

dalle1 completion bash > ~/.local/share/bash-completion/completions/dalle1
dalle1 completion zsh >> ~/.zshrc
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module

from dalle1.cli import SUBCOMMANDS
from dalle1.console import bar, command_line, one_line_errors

ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"
SCRIPT = """\
_dalle1() {{
    local words
    case "${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _dalle1 dalle1
"""
"""A case for each beginning of a command line, the longest first. File names always complete."""


def completion_script(words: Mapping[str, Sequence[str]]) -> str:
    """Return the script for bash.

    Args:
        words: beginning of a command line, such as "train dvae" → what may follow it.
    """
    longest_first = sorted(words, key=lambda name: (-len(name), name))
    cases = (f'        "{name} "*) words="{" ".join(words[name])}" ;;' for name in longest_first)
    return SCRIPT.format(cases="\n".join(cases).replace('" "*)', "*)"))


def all_words() -> dict[str, list[str]]:
    """Return what may follow each beginning of a command line."""
    words: dict[str, list[str]] = {"": [], "completion": ["bash", "zsh"]}
    for name in bar(iterable=SUBCOMMANDS, desc="reading flags", unit="subcommand"):
        first, _, second = name.partition(" ")
        if first not in words[""]:
            words[""].append(first)
        if second:
            words.setdefault(first, []).append(second)
        words.setdefault(name, []).extend(flags(help_of(name)))
    return words


def help_of(name: str) -> str:
    """Return the help text of a subcommand."""
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        import_module(SUBCOMMANDS[name][0]).main(["--help"])
    return text.getvalue()


def flags(text: str) -> list[str]:
    """Return the flags, and the names of parts such as `toybox`, that a help text lists."""
    lines = re.findall(r"^[ │]+(?:-\w, )?(--\w.*|• \w+)", text, re.MULTILINE)
    return list(dict.fromkeys(re.findall(r"--\w[\w.-]*\w|(?<=• )\w+", "\n".join(lines))))


def main(args: Sequence[str] | None = None) -> None:
    with one_line_errors():
        words = command_line(args)
        if words and words[0] in ("-h", "--help"):
            print("usage: dalle1 completion bash | zsh\n", __doc__.strip(), sep="\n")
            raise SystemExit(0)
        if len(words) != 1 or words[0] not in ("bash", "zsh"):
            raise ValueError(f"the shell is {' '.join(words)!r}, expected bash or zsh")
        print(ZSH * (words[0] == "zsh") + completion_script(all_words()), end="")
