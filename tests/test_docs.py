"""The commands of the guide are understood as they are written."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

from dalle1.commands import evaluate, sample
from dalle1.console import parse_preset
from dalle1.data.check import CheckConfig
from dalle1.data.encoded import EncodeConfig
from dalle1.tasks.clip import CLIP_PRESETS
from dalle1.tasks.dvae import DVAE_PRESETS
from dalle1.tasks.transformer import TRANSFORMER_PRESETS

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "train-your-own.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
]
PRESETS: dict[str, Any] = {
    "train_dvae.py": DVAE_PRESETS,
    "train_transformer.py": TRANSFORMER_PRESETS,
    "train_clip.py": CLIP_PRESETS,
}
MODULES: dict[str, Any] = {"dalle1.data.check": CheckConfig, "dalle1.data.encoded": EncodeConfig}


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the options that a command is understood to have, without running it."""
    assert words[0] == "python"
    if words[1] == "-m":
        return tyro.cli(MODULES[words[2]], args=words[3:])
    script, args = words[1], words[2:]
    if script in PRESETS:
        return parse_preset(PRESETS[script], args, "")
    if script == "sample.py":
        return sample.parse(args)
    if script == "recipes/photographs.py":
        return runpy.run_path(str(ROOT / script))["parse"](args)
    assert script == "evaluate.py"
    given: list[Any] = []
    monkeypatch.setattr(evaluate, "run", given.append)
    evaluate.main(args)
    return given[0]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:4]))
def test_every_command_of_the_guide_is_understood(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert understood(words, monkeypatch).out.parts[0] == "runs"


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:4]))
def test_a_flag_that_is_none_is_noticed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, ValueError)):
        understood([*words, "--no-such-flag", "1"], monkeypatch)


def test_the_guide_leads_from_pictures_to_samples() -> None:
    scripts = [words[2] if words[1] == "-m" else words[1] for words in COMMANDS]
    order = ["dalle1.data.check", *PRESETS]
    assert [name for name in scripts if name in order][:1] == ["dalle1.data.check"]
    for name in (*MODULES, *PRESETS, "sample.py"):
        assert name in scripts
