"""The error of a solver on a teacher, and the cheapest solver that is accurate enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsno_cluster.diffusion.guidance import TeacherLike
from dsno_cluster.diffusion.solvers import Method, solve_with
from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_STEPS = 1024  # six per period of the fastest term of the usual level embedding
CANDIDATES = (("abm3", "fine-end"), ("dpmpp-2m", "uniform"))
STEPS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 52, 56, 60, 64, 72, 80, 96, 112, 128, 160, 192, 256)


@dataclass(frozen=True)
class Choice:
    """A method and its relative error at each time point."""

    method: Method
    errors: tuple[float, ...]


def reference_method(method: Method, times: Sequence[float]) -> Method:
    """`method` with so many steps that its own error is far below any error measured against its states."""
    return replace(method, solver="abm3", steps=max(REFERENCE_STEPS, len(times)), grid="uniform")


def relative_errors(states_NMCHW: Tensor, reference_NMCHW: Tensor) -> tuple[float, ...]:
    """||states - reference|| / ||reference|| at each time point, over all samples, (M,)."""
    difference = (states_NMCHW - reference_NMCHW).double().square().sum((0, 2, 3, 4))
    return tuple((difference / reference_NMCHW.double().square().sum((0, 2, 3, 4))).sqrt().tolist())


def cheapest(
    method: Method,
    teacher: TeacherLike,
    noise: Tensor,
    times: Sequence[float],
    tolerance: float,
    labels: Tensor | None = None,
    tried: Callable[[Choice], None] = lambda choice: None,
) -> Choice:
    """The choice with the fewest evaluations whose error is within `tolerance` at every time point.

    Guidance and clipping are those of `method`; solver, steps and grid are chosen. Errors do not fall
    steadily with the steps (see `schedule.fine_end`), so each number of steps is tried, starting from the
    cheapest. Raises UserError if none is accurate enough.
    """
    reference = solve_with(reference_method(method, times), teacher, noise, times, labels)
    best: Choice | None = None
    for steps in STEPS:
        for solver, grid in CANDIDATES:
            candidate = replace(method, solver=solver, steps=steps, grid=grid)
            try:
                candidate.evaluations(times)
            except ValueError:  # fewer steps than time points
                continue
            states = solve_with(candidate, teacher, noise, times, labels)
            choice = Choice(candidate, relative_errors(states, reference))
            tried(choice)
            if max(choice.errors) <= tolerance:
                return choice
            if best is None or max(choice.errors) < max(best.errors):
                best = choice
    assert best is not None
    raise UserError(
        f"--tolerance {tolerance:g}: not reached within {STEPS[-1]} evaluations; the best was {best.method.solver} "
        f"with {best.method.steps}, off by {max(best.errors):.2g}"
    )
