"""Reads a file as a teacher while an audit hook watches that nothing is run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from edm_files import SNAPSHOTS, snapshot_bytes

from dsno_cluster import load_teacher
from dsno_cluster.errors import UserError

# Python reports these to audit hooks before it does them; reading data causes none of them.
WATCHED = (
    "os.",
    "subprocess.",
    "exec",
    "compile",
    "import",
    "pickle.",
    "socket.",
    "shutil.",
    "marshal.",
    "ctypes.",
)
QUIET = ("os.listdir", "os.scandir", "os.fwalk", "os.walk")
happened: list[str] = []
loaded: list[bool] = []
watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[1], str) and any(c in arguments[1] for c in "wax+")
    if watching and event not in QUIET and (event.startswith(WATCHED) or writes):
        happened.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_hook)


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Fails if Python does any of WATCHED within, or opens a file to write."""
    global watching
    happened.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
    assert not happened, happened


@pytest.fixture(autouse=True)
def loaded_once(tmp_path: Path) -> None:
    """What is imported when it is first needed is imported, so that a later import is the file's."""
    if not loaded:
        for data in (*map(snapshot_bytes, SNAPSHOTS), b"\x80\x04\x82.", b"\x80\x04X\x03"):
            with contextlib.suppress(UserError):
                read(data, tmp_path, watched=False)
        loaded.append(True)


def read(data: bytes, folder: Path, *, watched: bool = True) -> Any:
    """The teacher of these bytes; what it gives has the shape of its images."""
    file = folder / "snapshot.pkl"
    file.write_bytes(data)
    with nothing_runs() if watched else contextlib.nullcontext():
        teacher = load_teacher(str(file))
    channels, height, width = teacher.shape
    if channels * height * width < 10_000:
        x = torch.zeros(1, channels, height, width)
        assert (
            teacher(x, 0.5, torch.zeros(1, dtype=torch.int64) if teacher.num_classes else None).shape
            == x.shape
        )
    return teacher
