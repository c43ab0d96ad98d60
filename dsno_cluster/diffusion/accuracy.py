"""How exact a solver is on a teacher, and the cheapest one that is exact enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsno_cluster.diffusion.solvers import TeacherLike, count_evaluations, solve
from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_STEPS = 1024  # six to a period of the fastest term of the usual level embedding
CANDIDATES = (("abm3", "fine-end"), ("dpmpp-2m", "uniform"))
STEPS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 52, 56, 60, 64, 72, 80, 96, 112, 128, 160, 192, 256)


@dataclass(frozen=True)
class Choice:
    """A solver, its grid and steps, and its relative error at each time point."""

    solver: str
    grid: str
    steps: int
    errors: tuple[float, ...]


def reference_states(
    teacher: TeacherLike,
    noise: Tensor,
    times: Sequence[float],
    labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip_denoised: bool = False,
) -> Tensor:
    """States at `times` solved so finely that what is left is far below any error measured against them."""
    steps = max(REFERENCE_STEPS, len(times))
    return solve(teacher, noise, times, "abm3", steps, labels, guidance_scale, clip_denoised, "uniform")


def relative_errors(states_NMCHW: Tensor, reference_NMCHW: Tensor) -> tuple[float, ...]:
    """||states - reference|| / ||reference|| at each time point, over all samples, (M,)."""
    difference = (states_NMCHW - reference_NMCHW).double().square().sum((0, 2, 3, 4))
    return tuple((difference / reference_NMCHW.double().square().sum((0, 2, 3, 4))).sqrt().tolist())


def cheapest(
    teacher: TeacherLike,
    noise: Tensor,
    times: Sequence[float],
    tolerance: float,
    labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip_denoised: bool = False,
    tried: Callable[[Choice], None] = lambda choice: None,
) -> Choice:
    """The choice of fewest evaluations whose error on these samples is within `tolerance` at every time point.

    Errors do not fall steadily with the steps (see `schedule.fine_end`), so each number of steps is tried, from
    the cheapest on. Raises UserError where none is good enough.
    """
    reference = reference_states(teacher, noise, times, labels, guidance_scale, clip_denoised)
    best: Choice | None = None
    for steps in STEPS:
        for solver, grid in CANDIDATES:
            try:
                count_evaluations(solver, steps, times=times, grid=grid)
            except ValueError:  # fewer steps than time points
                continue
            states = solve(teacher, noise, times, solver, steps, labels, guidance_scale, clip_denoised, grid)
            choice = Choice(solver, grid, steps, relative_errors(states, reference))
            tried(choice)
            if max(choice.errors) <= tolerance:
                return choice
            if best is None or max(choice.errors) < max(best.errors):
                best = choice
    assert best is not None
    raise UserError(
        f"--tolerance {tolerance:g}: not reached within {STEPS[-1]} evaluations; the best was {best.solver} "
        f"with {best.steps}, off by {max(best.errors):.2g}"
    )
