"""The samplings of the teacher, at several costs, with which an evaluation compares a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsno_cluster.config import Config
from dsno_cluster.diffusion.schedule import same_times
from dsno_cluster.diffusion.solvers import Method, grid_points
from dsno_cluster.teachers.of_config import ConfiguredTeacher


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from a teacher: its ODE solved by `method`, whose grid is decided, to the last of `times` (M,).

    `as_trajectories`: this sampling made the trajectories. `same` are samplings that this one replaces, since
    they pass through the same points.
    """

    method: Method
    times: tuple[float, ...] = (0.0,)
    as_trajectories: bool = False
    same: tuple[Sampling, ...] = ()

    @property
    def evaluations(self) -> int:
        """Network evaluations of one image."""
        return self.method.evaluations(self.times)

    @property
    def points(self) -> Sequence[float]:
        """The times that it passes through, descending."""
        return grid_points(self.times, self.method.solver, self.method.steps, self.method.grid)


def compared_samplings(config: Config, teacher: ConfiguredTeacher | None) -> list[Sampling]:
    """DDIM with `evaluation.teacher_steps`, and what made the trajectories, by cost; each only once.

    A distilled teacher knows only the levels of its own steps, so only numbers of steps that divide its own
    are kept. DDIM through all of a teacher's own steps is its own sampler, and ends as that does
    (`clean_end`). If `teacher` is None, only the config decides.
    """
    settings, costs = config.trajectories, dict.fromkeys(config.evaluation.teacher_steps)
    method = teacher.method if teacher else settings.method.on(None)
    if teacher and teacher.info.distilled and teacher.info.num_steps is not None:
        costs = {steps: None for steps in costs if teacher.info.num_steps % steps == 0}
    made_by = Sampling(method, settings.time_points, as_trajectories=True)
    ddim = replace(method, solver="ddim", grid="uniform", clean_end=False)
    few = [Sampling(replace(ddim, steps=steps)) for steps in costs]
    same = tuple(one for one in few if _same(one, made_by))
    others = [one for one in few if one not in same]
    return sorted([*others, replace(made_by, same=same)], key=lambda sampling: sampling.evaluations)


def _same(one: Sampling, other: Sampling) -> bool:
    return one.method.solver == other.method.solver and same_times(one.points, other.points)
