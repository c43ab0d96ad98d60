"""The objectives that a training step minimises, a module each.

`training/loop.py` does not know which one it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from dsno_cluster.trajectories.reader import Batch

Student = Callable[[Tensor, Tensor | None, Sequence[int]], Tensor]
"""A student as `DSNO.forward`, or the engine around it: noise, labels, positions of time points -> their states."""


Network = Callable[..., Any]
"""A companion's network, or the engine around it, through which gradients reach its weights."""


@dataclass(frozen=True)
class StepFigures:
    """A step's loss, its distance at each time point, None at those that it did not see, and other figures by name.

    `watched` are the values of `Objective.figure_names`, None for those that the step did not compute.
    """

    loss: float
    distance_per_time: tuple[float | None, ...]
    watched: tuple[float | None, ...]
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Companion:
    """A further network that an objective trains, on the same batches: it is updated before each step of the student.

    `lr` is its learning rate after the warm-up of the rate, which does not fall: it has to follow a student whose own does.
    `updates` is the number of its updates before each optimiser step of the student, and `warmup` that of further ones before the
    first step, between which a training can be interrupted. `loss(student, network, batch, step, update)` gives what update
    `update` before a step minimises, evaluating `network` by the engine that is passed, and its figures, as `Objective.loss`.
    Before step 0 those of the warm-up are numbered first.
    """

    network: nn.Module
    lr: float
    updates: int
    warmup: int
    loss: Callable[[Student, Network, Batch, int, int], tuple[Tensor, Tensor]]


class Objective(Protocol):
    """The computation of a step, with the further networks that it trains, by name.

    `figure_names` say what a step's figures are; all of them are positive, and a jump of one is a sign of divergence. `state`
    are further tensors that training changes in place, by name, the same on every rank; a checkpoint has them.
    """

    figure_names: tuple[str, ...]
    companions: Mapping[str, Companion]
    state: Mapping[str, Tensor]

    def loss(self, student: Student, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The scalar that optimiser step `step` (0-based) minimises on a micro-batch, and its figures, (F,).

        The figures carry no gradient; the loop averages them over the micro-batches and ranks of a step, and adds those of the
        companions, which are 0 here.
        """
        ...

    def summary(self, figures: Sequence[float], step: int) -> StepFigures:
        """The summary of the averaged figures of step `step`."""
        ...
