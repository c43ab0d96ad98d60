"""The sources of an evaluation's images, the tasks of its pool, and their results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsno_cluster.evaluation.metrics import BlockResult
from dsno_cluster.teachers import Sampling
from dsno_cluster.trajectories.shards import Shard


@dataclass(frozen=True)
class ImageSource:
    """A source of images: the student, the teacher with a `sampling`, or the image set at an `address`."""

    kind: Literal["student", "teacher", "images"]
    sampling: Sampling | None = None
    address: str = ""
    is_reference: bool = False  # otherwise images that are compared with it, possibly the same ones

    @property
    def title(self) -> str:
        return f"teacher, {self.sampling.method.solver}" if self.sampling else self.address or self.kind

    @property
    def evaluations(self) -> int:
        """Network evaluations of the teacher per image."""
        return self.sampling.evaluations if self.sampling else 0


STUDENT = ImageSource("student")
HELD_OUT = ImageSource("images", address="held-out")


@dataclass(frozen=True)
class Block:
    """A task of the pool: some work on samples [start, stop) of a source.

    `features` measures them, `trajectory` compares the student's trajectories with the teacher's, `cost`
    times student and teacher, and `pictures` gives the states of both for the pictures.
    """

    work: Literal["features", "trajectory", "cost", "pictures"]
    source: ImageSource
    start: int
    stop: int


@dataclass(frozen=True)
class MeasuredBlock:
    """The result of a block's images, and the manifest's lines of their shards, if they are kept."""

    result: BlockResult
    kept: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class TrajectoryError:
    """Sums over samples of squared differences from the teacher's states, and of those states squared.

    (M,) float64.
    """

    difference: np.ndarray
    target: np.ndarray
