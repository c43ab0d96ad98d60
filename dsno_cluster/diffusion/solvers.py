"""Probability-flow ODE solvers: pure functions from a denoiser, noise and a time grid to states.

All of them work on predictions of the clean image x0. With theta the angle of the schedule (alpha = cos theta,
sigma = sin theta), DDIM's step is the exact solution for a constant x0. States stay float32; coefficients are
float64 numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsno_cluster.diffusion.schedule import alpha_sigma, angle, refine

Denoiser = Callable[[Tensor, float], Tensor]
"""(x_NCHW, t) -> predicted clean x0, the shape of x."""


class TeacherLike(Protocol):
    def __call__(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor: ...


def solve(
    teacher: TeacherLike,
    noise: Tensor,
    times: Sequence[float],
    solver: str = "ddim",
    steps: int = 512,
    labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip_denoised: bool = False,
) -> Tensor:
    """States of the probability-flow ODE at `times`, from `noise` at t=1.

    `noise` (N, C, H, W) float32; `times` descend strictly within [0, 1); `steps` is the number of intervals
    from t=1 to t=0, refined so that every time point is hit exactly -> (N, M, C, H, W) float32. The network
    evaluations used are `count_evaluations(solver, steps, guidance_scale, times)`. `clip_denoised` clamps every
    prediction of x0 to [-1, 1].

    Raises ValueError for an unknown solver, times that do not descend, too few steps, or guidance of a teacher
    that has no null class.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of: {', '.join(SOLVERS)}")
    grid = refine(times, steps)
    denoise = guided(teacher, labels, guidance_scale)
    if clip_denoised:
        unclipped = denoise
        denoise = lambda x, t: unclipped(x, t).clamp(-1.0, 1.0)  # noqa: E731
    wanted, states = {float(t) for t in times}, []
    with torch.no_grad():
        for t, state in SOLVERS[solver](denoise, noise, grid):
            if t in wanted:
                states.append(state)
            if t <= times[-1]:
                break
    return torch.stack(states, dim=1)


def count_evaluations(
    solver: str, steps: int, guidance_scale: float = 1.0, times: Sequence[float] = (0.0,)
) -> int:
    """Network evaluations (NFE) that `solve` uses for one sample; guidance needs two at a time.

    `times` matter where they end before 0, since the intervals after the last one are not solved.
    """
    intervals = refine(times, steps).index(times[-1])
    per_solve = 2 * intervals - (times[-1] == 0.0) if solver == "heun" else intervals
    return per_solve * (1 if guidance_scale == 1.0 else 2)


def guided(teacher: TeacherLike, labels: Tensor | None, scale: float) -> Denoiser:
    """The teacher as a denoiser of (x, t), with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    x0 = x0(null) + scale (x0(label) - x0(null)); scale 1 is the conditional teacher itself.
    """
    if scale == 1.0:
        return lambda x, t: teacher(x, t, labels)
    null_class = getattr(teacher, "null_class", None)
    if labels is None or null_class is None:
        raise ValueError(f"guidance_scale {scale} needs labels and a teacher with a null class")
    nulls = torch.full_like(labels, null_class)

    def denoise(x: Tensor, t: float) -> Tensor:
        unconditional = teacher(x, t, nulls)
        return unconditional + scale * (teacher(x, t, labels) - unconditional)

    return denoise


def ddim(denoise: Denoiser, noise: Tensor, grid: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """First order: DDIM with eta 0 (Song et al. 2021, eq. 12). Yields (t, state) at every point but t=1."""
    x = noise
    for t, s in itertools.pairwise(grid):
        x = _towards(denoise(x, t), x, t, s)
        yield s, x


def heun(denoise: Denoiser, noise: Tensor, grid: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Second order, two evaluations a step: Heun's method on dx / dtheta = v (Karras et al. 2022, alg. 1).

    v = (alpha x - x0) / sigma. The last interval is one DDIM step, since v loses its digits where sigma
    vanishes.
    """
    x = noise
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        x0 = denoise(x, t)
        if i == len(grid) - 2:
            x = _towards(x0, x, t, s)
        else:
            step = angle(s) - angle(t)
            slope = _velocity(x0, x, t)
            euler = x + step * slope
            x = x + (0.5 * step) * (slope + _velocity(denoise(euler, s), euler, s))
        yield s, x


def dpmpp_2m(denoise: Denoiser, noise: Tensor, grid: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Second order, one evaluation a step: DPM-Solver++(2M) (Lu et al. 2022, alg. 2).

    First and last steps are first order: the extrapolation of x0 across the last, huge step in log-SNR is
    what spoils the end point otherwise.
    """
    x, previous = noise, None
    last_h = math.nan
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        x0 = denoise(x, t)
        h = _half_logsnr(s) - _half_logsnr(t)
        if previous is None or i == len(grid) - 2:
            x = _towards(x0, x, t, s)
        else:
            ratio = h / (2.0 * last_h)
            x = _towards((1.0 + ratio) * x0 - ratio * previous, x, t, s)
        previous, last_h = x0, h
        yield s, x


SOLVERS: dict[str, Callable[[Denoiser, Tensor, Sequence[float]], Iterator[tuple[float, Tensor]]]] = {
    "ddim": ddim,
    "heun": heun,
    "dpmpp-2m": dpmpp_2m,
}


def _scales(t: float) -> tuple[float, float]:
    alpha, sigma = alpha_sigma(t)
    return float(alpha), float(sigma)


def _velocity(x0: Tensor, x: Tensor, t: float) -> Tensor:
    alpha, sigma = _scales(t)
    return (alpha * x - x0) / sigma


def _half_logsnr(t: float) -> float:
    alpha, sigma = _scales(t)
    return math.log(alpha) - math.log(sigma)


def _towards(x0: Tensor, x: Tensor, t: float, s: float) -> Tensor:
    """The state at `s` from the state at `t`, for a constant prediction x0 (a DDIM step)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(t), _scales(s)
    return (sigma_s / sigma_t) * x + (alpha_s - sigma_s * alpha_t / sigma_t) * x0
