"""Every benchmark starts with today's code. Each takes minutes, so that is all: `make lint` checks what they call."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCHMARKS.glob("*.py")))
def test_it_starts(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(BENCHMARKS / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])  # as of a script: they import each other
    with pytest.raises(SystemExit) as left:
        runpy.run_path(file, run_name="__main__")
    assert left.value.code == 0 and f"usage: {name}.py" in capsys.readouterr().out
