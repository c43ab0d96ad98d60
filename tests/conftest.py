"""The surroundings of all tests, and a finished small data set."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from tiny import TINY, dsno

os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other
# links to the run folders of tests are no business of the user's
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="dsno-state-")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with the finished trajectories of the tiny experiment. Copy it before changing it."""
    root = tmp_path_factory.mktemp("tiny")
    made = dsno("gen-trajectories", *TINY, f"storage.root={root}", "--actors", "2", "--launcher", "local")
    assert made.returncode == 0, made.stderr
    return root
