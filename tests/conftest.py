"""The surroundings of all tests, and a finished small data set."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with the finished trajectories of the tiny experiment. Copy it before changing it."""
    root = tmp_path_factory.mktemp("tiny")
    made = dsno("gen-trajectories", *TINY, f"storage.root={root}", "--actors", "2", "--launcher", "local")
    assert made.returncode == 0, made.stderr
    return root
