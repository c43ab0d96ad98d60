"""Snapshots of EDM and EDM2 for tests (tests/data/make_edm.py), and what their original code gives."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import safetensors.torch
from tiny import DATA
from torch import Tensor

EDM = DATA / "edm"
SNAPSHOTS = ("ddpmpp_cond", "ncsnpp_ve", "skip_vp", "adm_iddpm", "edm2_cond")
# for tests that take seconds: one of each network at once, the others with the slow tests
FEW_SNAPSHOTS = [
    pytest.param(name, marks=pytest.mark.slow if name in ("ddpmpp_cond", "ncsnpp_ve") else ())
    for name in SNAPSHOTS
]


def snapshot_bytes(name: str) -> bytes:
    return gzip.decompress((EDM / f"{name}.pkl.gz").read_bytes())


def snapshot(name: str, folder: Path) -> str:
    """The path of a snapshot, unpacked into a folder."""
    file = folder / f"{name}.pkl"
    file.write_bytes(snapshot_bytes(name))
    return str(file)


def expected(name: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(EDM / f"{name}.safetensors")
