"""The table of formats: how each names, encodes and reads its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from dsno_cluster.trajectories.exchange import lmdb_parts, npz, webdataset
from dsno_cluster.trajectories.exchange.samples import OpenPart, PartFile, Samples
from dsno_cluster.trajectories.spec import ExchangeFormat


def _nothing_needed() -> None:
    pass


@dataclass(frozen=True)
class Format:
    """A format of parts. `ending` is that of a part's key, `members` describes what a part holds.

    `check_installed` raises UserError if a library is missing that `encode` needs.
    """

    ending: str
    members: dict[str, str]
    part_key: Callable[[int], str]
    encode: Callable[[Samples], bytes]
    open: Callable[[PartFile, str], OpenPart]
    check_installed: Callable[[], None] = _nothing_needed


FORMATS: dict[ExchangeFormat, Format] = {
    "webdataset": Format(
        ".tar",
        webdataset.MEMBERS,
        webdataset.part_key,
        webdataset.encode,
        webdataset.TarPart,
    ),
    "lmdb": Format(
        lmdb_parts.DATA,
        lmdb_parts.MEMBERS,
        lmdb_parts.part_key,
        lmdb_parts.encode,
        lmdb_parts.LmdbPart,
        lmdb_parts.check_installed,
    ),
    "npz": Format(".npz", npz.MEMBERS, npz.part_key, npz.encode, npz.NpzPart),
}
assert tuple(FORMATS) == get_args(ExchangeFormat)
