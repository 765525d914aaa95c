"""Flags of the recipe at a tiny size, and commands that must fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

RUN = ["--steps", "2", "--batch-size", "2", "--num-workers", "0", "--device", "cpu"]
TINY_DVAE = [
    *("--model.image-size", "64", "--model.width", "8", "--model.codebook-size", "16"),
    *("--crop-size", "32", "--validation-images", "2", "--data", "toybox:4"),
]
TINY_TRANSFORMER = [
    *("--model.width", "16", "--model.depth", "2", "--model.heads", "2"),
    *("--model.text-len", "8", "--model.text-vocab", "260"),
    *("--vocab-captions", "4", "--prompts", "a red star"),
]
PROMPT = "A red star!"


def refused(
    main: Callable[[list[str]], None], args: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command that must fail; return its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
