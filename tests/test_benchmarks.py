"""Every benchmark starts with today's code. Each takes minutes, so that is nearly all: `make lint` checks what they call."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsno_cluster import console
from dsno_cluster.config import Config, load_config
from dsno_cluster.students.dsno import DSNO

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCHMARKS.glob("*.py")))
def test_it_starts(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(BENCHMARKS / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])  # as of a script: they import each other
    with pytest.raises(SystemExit) as left:
        runpy.run_path(file, run_name="__main__")
    assert left.value.code == 0 and f"usage: {name}.py" in capsys.readouterr().out


class Published(nn.Module):
    """In the place of the published network, whose code cannot be had here: ours, called as that one is."""

    def __init__(self, student: DSNO) -> None:
        super().__init__()
        self.student = student

    def forward(self, noise: Tensor, levels: Tensor, labels: Tensor | None) -> Tensor:
        return self.student(noise, labels)


@pytest.mark.parametrize(
    ("cases", "published", "rows"),
    [
        (["published", "float32"], True, ["published", "float32"]),
        (["float32"], True, ["published", "float32"]),
        (["float32"], False, ["float32", "T=1 U-Net"]),
    ],
)
def test_some_cases_of_sampler(
    cases: list[str],
    published: bool,
    rows: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those that are named and what they are compared with."""
    sampler = runpy.run_path(str(BENCHMARKS / "sampler.py"), run_name="sampler")
    names = sampler["main"].__globals__

    def network(config: Config, folder: Path) -> nn.Module:
        return Published(sampler["build"]("float32", config, None))

    shown: list[list[str]] = []
    monkeypatch.setitem(names, "published_network", network)
    monkeypatch.setitem(names, "from_published_torch", lambda theirs, unet, where: unet.state_dict())
    monkeypatch.setitem(names, "run_memory", lambda options, case, work: 0)  # a process of its own
    monkeypatch.setattr(console, "table", lambda title, header, rows: shown.extend(rows))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tddpmm.py").touch()
    words = ["--config", "configs/digits.yaml", "--batch", "2", "--rounds", "1", "--works", "sample"]
    words += ["--published", str(tmp_path)] if published else []
    sampler["main"]([*words, "--cases", *cases])
    assert [row[0] for row in shown] == rows
    assert ("float32: 0.0e+00 of the published outputs" in capsys.readouterr().out) == published


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cases", "published"], "--cases published: needs --published DIR"),
        (["--published", "nowhere"], "nowhere: has no models/tddpmm.py"),
    ],
)
def test_sampler_says_what_it_needs(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    sampler = runpy.run_path(str(BENCHMARKS / "sampler.py"), run_name="sampler")
    with pytest.raises(SystemExit) as left:
        sampler["main"](words)
    assert left.value.code == 2 and says in capsys.readouterr().err


def test_finishing_from_either_start_is_the_finishing_of_run() -> None:
    """What it passes to `train` gives the same training as `finish` does, apart from the name and the start."""
    finishing = runpy.run_path(str(BENCHMARKS / "finishing.py"), run_name="finishing")
    words = ["finish.enabled=true", "finish.steps=7", "finish.heldout_every=null"]
    config = load_config("configs/digits.yaml", words)
    assert config.finished is not None
    begun = config.finished.training
    taken = load_config(
        "configs/digits.yaml", [*finishing["finishing_words"](config), f"training.start={begun.start}"]
    )
    assert taken.training == begun and begun.steps == 7


def test_reader_says_how_to_have_its_peers(capsys: pytest.CaptureFixture[str]) -> None:
    reader = runpy.run_path(str(BENCHMARKS / "reader.py"), run_name="reader")
    with reader["peer_or_word"]("litdata"):
        importlib.import_module("no_such_peer")
    (line,) = capsys.readouterr().out.splitlines()
    assert "there is no no_such_peer here" in line and ".venv-bench/bin/python benchmarks/reader.py" in line


def test_make_bench_gives_the_peers_an_environment_of_their_own() -> None:
    asked = subprocess.run(
        ["make", "-n", "bench"], cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True
    )
    assert "benchmarks/reader.py) python=.venv-bench/bin/python" in asked.stdout
    assert ".venv-bench/bin/python -m pip install --quiet --editable '.[bench]'" in asked.stdout


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *words]
    return subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_small_form_of_gpu(tmp_path: Path) -> None:
    done = gpu("--small", "--no-compile", "--parts", "samples", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "figures.json").read_text())
    found = {figure["name"]: figure for figure in record["figures"]}
    assert {"sample, published form, float32", "sample, series"} <= found.keys() and not record["missing"]
    assert all(figure["value"] > 0 for figure in found.values())
    # bfloat16 is another answer, and not far off
    assert 0.0 == found["sample, series, float32"]["error"] < found["sample, series"]["error"] < 0.03


@pytest.mark.slow
def test_all_of_the_small_form_of_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)  # as of a script
    done = gpu("--small", "--no-compile", "--minutes", "20", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "figures.json").read_text())
    names = runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="gpu")["MARKS"]
    assert set(names) <= {figure["name"] for figure in record["figures"]} and not record["missing"]


@pytest.mark.slow
def test_gpu_makes_one_shard_twice_with_a_compiled_teacher(tmp_path: Path) -> None:
    done = gpu("--small", "--minutes", "20", "--parts", "bytes", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    (figure,) = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figure["name"] == "one shard, twice: different digests" and figure["value"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_that_there_is_none() -> None:
    done = gpu()
    assert done.returncode == 2 and "no GPU is visible here; --small" in done.stderr
