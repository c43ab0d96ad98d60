"""What several tests need: a tiny experiment, the command line as a user runs it, and a small disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsno_cluster.cli import main

DATA = Path(__file__).parent / "data"

# a run of the real path in seconds: the shipped teacher, few samples, few steps
TINY = [
    "trajectories.num_samples=96",
    "trajectories.samples_per_shard=16",
    "trajectories.batch_size=16",
    "trajectories.steps=6",
    "training.steps=4",
    "training.batch_size=16",
    "training.checkpoint_every=2",
    "training.log_every=1",
    "training.heldout_every=null",
    "training.picture_every=null",
    "evaluation.num_samples=200",
    "evaluation.batch_size=50",
    "evaluation.trajectory_samples=20",
    "evaluation.teacher_steps=[1, 2]",
    "evaluation.picture_columns=2",
]


def distilled_experiment(teacher: Path) -> tuple[dict[str, Any], int]:
    """A config on a distilled teacher's model folder, solved with DDIM on its own steps, and their number."""
    model = json.loads((teacher / "meta.json").read_text())["model"]
    steps = model["num_steps"]
    experiment = {
        "network": model["network"],
        "teacher": {"path": str(teacher)},
        "trajectories": {
            "num_samples": 4,
            "samples_per_shard": 2,
            "batch_size": 2,
            "solver": "ddim",
            "steps": steps,
            "times": [0.5, 0.0],
        },
        "student": {"modes": 1},
        "training": {"steps": 1, "batch_size": 2, "lr": 1e-3},
        "evaluation": {"num_samples": 2, "reference": "none.npz"},
    }
    return experiment, steps


def dsno(
    *words: str, cwd: Path | None = None, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `dsno-cluster` as a user does: in a process of its own."""
    command = [sys.executable, "-m", "dsno_cluster.cli", *map(str, words)]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
        check=False,
    )


def answer(*words: str, cwd: Path = Path(), **env: str) -> subprocess.CompletedProcess[str]:
    """What `dsno-cluster` answers from this process, without seconds of imports: refusals, and commands without a launcher."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        for name, value in env.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(word) for word in words])
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of `size` at a new `folder`; yields what gives it another size. Skips where it cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("mounts a small file system, which needs root")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount a small file system")

    def resize(larger: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={larger}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
