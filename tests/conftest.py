"""What several tests need: a tiny experiment, the command line, and a finished small data set."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other
# links to the run folders of tests are no business of the user's
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="dsno-state-")

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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with the finished trajectories of the tiny experiment. Copy it before changing it."""
    root = tmp_path_factory.mktemp("tiny")
    made = dsno("gen-trajectories", *TINY, f"storage.root={root}", "--actors", "2", "--launcher", "local")
    assert made.returncode == 0, made.stderr
    return root
