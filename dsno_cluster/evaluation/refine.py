"""Trading time for quality: the student's state at an intermediate time, finished by a few steps of its teacher."""

from __future__ import annotations

from torch import Tensor

from dsno_cluster.diffusion.guidance import UNGUIDED, Guidance
from dsno_cluster.diffusion.solvers import Method, solve_with
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.teachers import Teacher


def refinement_grid(time: float, steps: int) -> list[float]:
    """`steps` intervals from `time` down to 0, equal in the square root of the time (finer towards the data)."""
    return [time * ((steps - i) / steps) ** 2 for i in range(steps + 1)]


def refinement_method(time: float, steps: int, guidance: Guidance, clip_denoised: bool = False) -> Method:
    """`steps` DDIM steps from `time` down to 0."""
    return Method(
        "ddim",
        steps,
        tuple(refinement_grid(time, steps)),
        guidance.scale,
        clip_denoised,
        guidance_interval=guidance.interval,
        guidance_channels=guidance.channels,
    )


def refine(
    student: DSNO,
    teacher: Teacher,
    noise: Tensor,
    labels: Tensor | None,
    time: float,
    steps: int,
    guidance: Guidance = UNGUIDED,
    clip_denoised: bool = False,
) -> Tensor:
    """Images (N, C, H, W) from noise: the student's state at `time`, then `steps` DDIM steps of the teacher to t=0.

    It costs one evaluation of the student and those of `refinement_method`. Raises ValueError for a time at which the student has
    no state.
    """
    state = student.trajectory(noise, labels, [time])[:, 0]
    method = refinement_method(time, steps, guidance, clip_denoised)
    return solve_with(method, teacher, state, [0.0], labels)[:, 0]
