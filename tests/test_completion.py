"""The script for shells, as bash runs it."""

import shutil
import subprocess

import pytest

from dalle1 import completion

WORDS = {
    "": ["sample", "train", "evaluate"],
    "sample": ["--guidance", "--num-images", "--num-candidates"],
    "train": ["dvae", "clip"],
    "train dvae": ["--steps"],
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_subcommands_and_flags() -> None:
    lines = ["tr", "train d", "train dvae --st", "sample 'a cat' --num", "sample --json --gu"]
    expected = ["train", "dvae", "--steps", "--num-images --num-candidates", "--guidance"]
    script = completion.completion_script(WORDS)
    for line in lines:
        script += f"COMP_WORDS=(dalle1 {line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        script += '_dalle1; echo "${COMPREPLY[*]}"\n'
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == expected


def test_flags_are_read_from_help_texts() -> None:
    assert completion.flags(completion.help_of("toybox"))[:3] == ["--help", "--out", "--num-scenes"]
    text = "  -h, --help   shown\n  --top-k N    more\n│  • bits   Measure\n│ --up, --no-up │\n"
    assert completion.flags(text) == ["--help", "--top-k", "bits", "--up", "--no-up"]


@pytest.mark.parametrize("args", [[], ["fish"], ["bash", "zsh"]])
def test_other_shells_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        completion.main(args)
    assert stop.value.code == 2
    assert "expected bash or zsh" in capsys.readouterr().err
