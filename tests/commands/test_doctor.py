"""The report for a bug report."""

from pathlib import Path

import pytest

from dalle1.commands import doctor


def test_it_reports_versions_and_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--no-sample", "--device", "cpu"])
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"system", "packages", "device", "precision", "processors"} < set(facts)
    assert "torch 2" in facts["packages"]
    assert facts["device"].startswith("cpu, ")


def test_a_model_that_cannot_sample_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--model", str(tmp_path), "--device", "cpu"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("system")
    assert len(printed.err.splitlines()) == 1
