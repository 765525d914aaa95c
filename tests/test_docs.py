"""The commands of the guide are understood as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

import sample
from dalle1.cli import parse_preset
from dalle1.data.check import CheckConfig
from dalle1.data.codes import EncodeConfig
from dalle1.presets import CLIP_PRESETS, DVAE_PRESETS, TRANSFORMER_PRESETS

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
MODULES: dict[str, Any] = {"dalle1.data.check": CheckConfig, "dalle1.data.codes": EncodeConfig}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:4]))
def test_every_command_of_the_guide_is_understood(words: list[str]) -> None:
    assert words[0] == "python"
    if words[1] == "-m":
        assert tyro.cli(MODULES[words[2]], args=words[3:]).out.parts[0] == "runs"
    elif words[1] in PRESETS:
        assert parse_preset(PRESETS[words[1]], words[2:], "").out.parts[0] == "runs"
    else:
        assert (ROOT / words[1]).is_file()


def test_the_guide_leads_from_pictures_to_samples() -> None:
    scripts = [words[2] if words[1] == "-m" else words[1] for words in COMMANDS]
    order = ["dalle1.data.check", *PRESETS]
    assert [name for name in scripts if name in order][:1] == ["dalle1.data.check"]
    for name in (*MODULES, *PRESETS, Path(sample.__file__).name):
        assert name in scripts
