"""Sharing the work on a data set among tasks that do not talk to each other: those of an array of jobs.

Each task makes the shards of its own share first, and then, in an order of its own, those of the others that are still
missing. So the shares of tasks that died, or did not start, are made too, and every task ends when all shards exist. What
the others have finished is seen in the storage. Each task notes its shards in a file of its own, so that the one that
commits the manifest need not read those of the others.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from dsno_cluster.errors import WorkError
from dsno_cluster.provenance import Environment
from dsno_cluster.storage import Storage
from dsno_cluster.trajectories.shards import MADE_SHARDS, MadeShards, read_made_shards


@dataclass(frozen=True)
class Share:
    """The share `place` of `count`."""

    place: int
    count: int

    @property
    def notes(self) -> str:
        """The name of the file with this task's notes."""
        return MADE_SHARDS.replace(".", f"-{self.place}.")

    def in_order(self, indices: Sequence[int]) -> list[int]:
        """The shards `indices` in the order in which this task makes them."""
        own = [index for index in indices if index % self.count == self.place]
        others = [index for index in indices if index % self.count != self.place]
        random.Random(self.place).shuffle(others)  # so that two tasks seldom make the same one
        return own + others


def read_all_notes(storage: Storage, folder: str) -> list[MadeShards]:
    """The notes of all tasks that have not finished the data set in `folder`."""
    return [read_made_shards(storage, folder, name) for name in _names_of_notes(storage, folder)]


def environments_noted(storage: Storage, folder: str) -> list[Environment]:
    """What made the shards in `folder` that are noted."""
    return [notes.environment for notes in read_all_notes(storage, folder) if notes.environment is not None]


def together(notes: Sequence[MadeShards]) -> MadeShards:
    """All notes as those of one task, which took the time of all; its environment is one that made shards, if any did."""
    shards = {key: line for one in notes for key, line in one.by_key.items()}
    first_those_with_shards = sorted(notes, key=lambda one: not one.shards)
    environments = [one.environment for one in first_those_with_shards if one.environment is not None]
    if not environments:
        return MadeShards(shards=tuple(shards.values()))
    seconds = round(sum(environment.seconds or 0.0 for environment in environments), 1)
    environment = environments[0].model_copy(update={"seconds": seconds})
    return MadeShards(environment=environment, shards=tuple(shards.values()))


def delete_notes(storage: Storage, folder: str) -> None:
    """Delete the notes of all tasks, which a manifest has replaced."""
    with contextlib.suppress(WorkError):  # housekeeping
        for name in _names_of_notes(storage, folder):
            storage.delete(folder + name)


def _names_of_notes(storage: Storage, folder: str) -> list[str]:
    """The files in which tasks, and runs that shared with nobody, have noted their shards."""
    return [stat.key.removeprefix(folder) for stat in storage.list(folder + MADE_SHARDS.partition(".")[0])]
