"""Snapshots of EDM with spoiled bytes: each is a teacher or one line, and nothing of it is run."""

from __future__ import annotations

import pickletools
import random
from pathlib import Path

import pytest
from edm_files import SNAPSHOTS, snapshot_bytes
from hostile_files import loaded_once as loaded_once  # fixtures
from hostile_files import read
from teacher_models import one_thread as one_thread

from dsno_cluster.errors import UserError


def fuzzed(data: bytes, draw: random.Random, places: list[int]) -> bytes:
    """The bytes with a few of them changed, removed, repeated or moved, most of them where instructions are."""
    spoiled = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.choice(places) if draw.random() < 0.9 else draw.randrange(len(data))
        at = min(at, len(spoiled) - 1)
        kind = draw.randrange(5)
        if kind == 0:
            spoiled[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            spoiled[at] = draw.randrange(256)
        elif kind == 2:
            del spoiled[at : at + draw.choice((1, 2, 9))]
        elif kind == 3:
            spoiled[at:at] = spoiled[at : at + draw.choice((1, 3, 40))]
        else:
            other = draw.choice(places)
            spoiled[at : at + 1] = data[other : other + draw.choice((1, 2, 12))]
    return bytes(spoiled)


def places_of(data: bytes) -> list[int]:
    """Where instructions are and their short arguments, also in the streams of storages."""
    places = []
    for op, argument, position in pickletools.genops(data):
        assert position is not None
        length = len(argument) if isinstance(argument, (str, bytes)) else 0
        inner = 400 if op.name in ("BINBYTES", "SHORT_BINBYTES") else 64
        places += range(position, min(position + 1 + min(length + 8, inner), len(data)))
    return places


def fuzz(name: str, count: int, seed: int, folder: Path) -> int:
    """How many of the spoiled files were refused; the others made teachers."""
    data, draw = snapshot_bytes(name), random.Random(seed)
    places, bad = places_of(data), 0
    for number in range(count):
        try:
            read(fuzzed(data, draw, places), folder)
        except UserError as error:
            assert "\n" not in str(error), (number, str(error))
            bad += 1
    return bad


def test_spoiled_bytes(tmp_path: Path) -> None:
    assert 20 < fuzz("edm2_cond", 60, 0, tmp_path) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", SNAPSHOTS)
def test_many_spoiled_bytes(name: str, tmp_path: Path) -> None:
    assert fuzz(name, 500, 1, tmp_path) > 100
