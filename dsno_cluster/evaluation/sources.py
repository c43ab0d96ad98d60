"""Where the images come from that an evaluation measures, the tasks of its pool, and their results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsno_cluster.evaluation.metrics import BlockResult
from dsno_cluster.teachers import Sampling
from dsno_cluster.trajectories.shards import Shard


@dataclass(frozen=True)
class ImageSource:
    """The student, the teacher by a `sampling`, or the image set at an `address`."""

    kind: Literal["student", "teacher", "images"]
    sampling: Sampling | None = None
    address: str = ""
    is_reference: bool = False  # else images that are compared with it, which may be the same ones

    @property
    def title(self) -> str:
        return f"teacher, {self.sampling.method.solver}" if self.sampling else self.address or self.kind

    @property
    def evaluations(self) -> int:
        """Network evaluations of the teacher for an image."""
        return self.sampling.evaluations if self.sampling else 0


STUDENT = ImageSource("student")
HELD_OUT = ImageSource("images", address="held-out")


@dataclass(frozen=True)
class Block:
    """One task of the pool: what to do with samples [start, stop) of a source.

    `features`: measure them. `trajectory`: compare the student's trajectories with the teacher's. `cost` times student and
    teacher, `pictures` gives states of both to look at.
    """

    work: Literal["features", "trajectory", "cost", "pictures"]
    source: ImageSource
    start: int
    stop: int


@dataclass(frozen=True)
class MeasuredBlock:
    """What was measured of a block's images, and the line of the shard that they were kept in, if they were."""

    result: BlockResult
    kept: Shard | None


@dataclass(frozen=True)
class TrajectoryError:
    """Sums over held-out samples of squared differences from the teacher's states, and of these squared; (M,) float64."""

    difference: np.ndarray
    target: np.ndarray
