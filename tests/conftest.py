"""The surroundings of all tests, and a finished small data set."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from pathlib import Path

import pytest
from tiny import TINY, dsno

os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other
# a script in the background ignores it, and hands that on to all below it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# links to the run folders of tests are no business of the user's
_state = tempfile.TemporaryDirectory(prefix="dsno-state-")  # removed when the tests end
os.environ["XDG_STATE_HOME"] = _state.name


def _gpus_are_wanted(config: pytest.Config) -> bool:
    """Whether `-m` asks for the tests that need a GPU."""
    return re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")) is not None


def pytest_configure(config: pytest.Config) -> None:
    # before a test imports torch, and for every process that a test starts: the others are to pass alike on any machine
    if not _gpus_are_wanted(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="I/N", help="every N-th of the tests, from the (I modulo N)-th on")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (share := config.getoption("--share")) is None:
        return
    index, count = map(int, share.split("/"))
    kept = items[index % count :: count]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if not _gpus_are_wanted(item.config):
        pytest.skip("needs a GPU, and tests hide GPUs: `make test-gpu` runs it")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch sees none on this machine")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with the finished trajectories of the tiny experiment. Copy it before changing it."""
    root = tmp_path_factory.mktemp("tiny")
    made = dsno("gen-trajectories", *TINY, f"storage.root={root}", "--actors", "2", "--launcher", "local")
    assert made.returncode == 0, made.stderr
    return root
