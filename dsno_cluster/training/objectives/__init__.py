"""The objectives that a training step minimises, a module each.

`training/loop.py` does not know which one it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.trajectories.reader import Batch

Student = Callable[[Tensor, Tensor | None, Sequence[int]], Tensor]
"""A student as `DSNO.forward`, or the engine around it: noise, labels, positions of time points -> their states."""


@dataclass(frozen=True)
class StepFigures:
    """A step's loss, and its distance at each time point, None at those that it did not see."""

    loss: float
    distance_per_time: tuple[float | None, ...]


class Objective(Protocol):
    """The computation of a step, with the further networks, optimisers and state that it needs."""

    num_figures: int

    def loss(self, student: Student, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The scalar that optimiser step `step` (0-based) minimises on a micro-batch, and its figures, (num_figures,).

        The figures carry no gradient; the loop averages them over the micro-batches and ranks of a step.
        """
        ...

    def summary(self, figures: Sequence[float], step: int) -> StepFigures:
        """The summary of the averaged figures of step `step`."""
        ...


def make_objective(config: Config, device: torch.device) -> Objective:
    """The objective of the config, its tensors on `device`. Raises UserError if weights that it needs are missing."""
    from dsno_cluster.training.objectives.trajectories import TrajectoryObjective

    return TrajectoryObjective(config, device)
