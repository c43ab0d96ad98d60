"""Probability-flow ODE solvers: pure functions from a denoiser, noise and a time grid to states.

All of them work on predictions of the clean image x0. With theta the angle of the schedule (alpha = cos theta,
sigma = sin theta), DDIM's step is the exact solution for a constant x0. States stay float32; coefficients are
float64 numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsno_cluster.diffusion.guidance import Guidance, TeacherLike, check_guidance, guided
from dsno_cluster.diffusion.schedule import alpha_sigma, angle, check_times, make_grid, same_time

if TYPE_CHECKING:
    from torch import Tensor

    from dsno_cluster.diffusion.guidance import Denoiser

    States = Iterator[tuple[float, Tensor]]  # (t, state) at every point of a grid except its first


@dataclass(frozen=True)
class Method:
    """How the sampling ODE is solved.

    `steps` is the number of intervals from t=1 to t=0. `grid` is `uniform`, `fine-end`, `auto` (the teacher's
    own steps if it has any, else the usual grid of the solver) or the times themselves, descending.
    `guidance_scale`, `guidance_interval`, `guidance_channels` and `joint_guidance` are those of `Guidance`.
    `clip_denoised` clamps every prediction of x0 to [-1, 1]. With `clean_end` the state at t=0 is the last prediction
    of x0 itself, as in the samplers of published teachers and of diffusers, which take sigma(0) as 0.
    """

    solver: str = "ddim"
    steps: int = 512
    grid: str | tuple[float, ...] = "auto"
    guidance_scale: float = 1.0
    clip_denoised: bool = False
    clean_end: bool = False
    joint_guidance: bool = False
    guidance_interval: tuple[float, float] | None = None
    guidance_channels: int | None = None

    @property
    def guidance(self) -> Guidance:
        """How the denoiser is guided."""
        return Guidance(
            self.guidance_scale, self.guidance_interval, self.guidance_channels, self.joint_guidance
        )

    def on(self, own_steps: tuple[float, ...] | None) -> Method:
        """This method with its grid decided: for `auto`, the teacher's `own_steps` if it has any."""
        if self.grid != "auto":
            return self
        if own_steps is None:
            return replace(self, grid=usual_grid(self.solver))
        return replace(self, grid=own_steps, clean_end=True)

    def evaluations(self, times: Sequence[float] = (0.0,)) -> int:
        """Network evaluations (NFE) of one sample solved to the last of `times`; see `count_evaluations`."""
        return count_evaluations(
            self.solver, self.steps, self.guidance_scale, times, self.grid, self.guidance_interval
        )

    def visited(self, times: Sequence[float] = (0.0,)) -> list[float]:
        """The times at which x0 is evaluated; see `evaluation_times`."""
        return evaluation_times(self.solver, self.steps, times, self.grid)

    def guided_evaluations(self, times: Sequence[float] = (0.0,)) -> int:
        """How many evaluations of x0 are guided, and so count twice."""
        return sum(map(self.guidance.acts, self.visited(times)))


def solve(
    teacher: TeacherLike,
    noise: Tensor,
    times: Sequence[float],
    solver: str = "ddim",
    steps: int = 512,
    labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    clip_denoised: bool = False,
    grid: str | Sequence[float] = "auto",
    guidance_interval: tuple[float, float] | None = None,
    guidance_channels: int | None = None,
) -> Tensor:
    """States of the probability-flow ODE at `times`, from `noise` at t=1.

    `noise` (N, C, H, W) float32; `times` descend strictly within [0, 1); `steps` is the number of intervals
    from t=1 to t=0 -> (N, M, C, H, W) float32. The network evaluations used are `count_evaluations(...)` of the
    same arguments. `clip_denoised` clamps every prediction of x0 to [-1, 1].

    `guidance_scale` other than 1 moves x0 away from that without a class or, if the teacher has a `guide` (see
    `Teacher.guided_by`), from the guide's. `guidance_interval` (low, high) does so only at noise levels sigma / alpha above
    `low` and up to `high`, `guidance_channels` only in so many first channels.

    `grid` names how the intervals lie; all grids pass exactly through every time point, nothing is
    interpolated. auto: the teacher's own steps if it has some (then `steps` follows from them, the noise is
    the state at the first of them, and the state at t=0 is the last prediction of x0), else `fine-end` for
    abm3 and `uniform` for the other solvers. A sequence of descending times is taken as it is.

    Raises ValueError for an unknown solver or grid, times that do not descend or are not on a given grid, too
    few steps or more than the teacher has of its own, a solver other than ddim on the own steps of a distilled
    teacher, guidance of a teacher that has no null class and no guide, or an interval or channels without guidance.
    """
    named = grid if isinstance(grid, str) else tuple(float(t) for t in grid)
    method = Method(
        solver,
        steps,
        named,
        guidance_scale,
        clip_denoised,
        joint_guidance=True,
        guidance_interval=guidance_interval,
        guidance_channels=guidance_channels,
    )
    return solve_with(method, teacher, noise, times, labels)


def solve_with(
    method: Method, teacher: TeacherLike, noise: Tensor, times: Sequence[float], labels: Tensor | None = None
) -> Tensor:
    """`solve` by a `Method`: the states at `times`, (N, M, C, H, W)."""
    import torch

    if method.solver not in SOLVERS:
        raise ValueError(f"solver {method.solver!r} is not one of: {', '.join(SOLVERS)}")
    own_steps = native_grid(teacher, method.steps) if method.grid == "auto" else None
    if own_steps is not None and method.solver != "ddim" and getattr(teacher, "distilled", False):
        raise ValueError(
            f"solver {method.solver!r}: each own step of a distilled teacher is one step of 'ddim'"
        )
    method = method.on(own_steps)
    points = grid_points(times, method.solver, method.steps, method.grid)
    if labels is not None:
        labels = labels.to(noise.device)  # once, not at every evaluation
    denoise = guided(teacher, labels, method.guidance)
    if method.clip_denoised:
        unclipped = denoise
        denoise = lambda x, t: unclipped(x, t).clamp(-1.0, 1.0)  # noqa: E731
    states: list[Tensor] = []
    with torch.no_grad():
        for t, state in SOLVERS[method.solver](denoise, noise, points, method.clean_end):
            if same_time(t, times[len(states)]):
                states.append(state)
            if len(states) == len(times):
                break
    return torch.stack(states, dim=1)


def native_grid(teacher: Any, steps: int) -> tuple[float, ...] | None:
    """The teacher's own steps, if it has some: see `Teacher.native_grid`."""
    own = getattr(teacher, "native_grid", None)
    return None if own is None else own(steps)


def grid_points(
    times: Sequence[float], solver: str, steps: int, grid: str | Sequence[float] = "auto"
) -> list[float]:
    """The points that `solve` passes through, descending.

    `grid` is as for `solve`, except that a teacher's own steps are given as a sequence. Raises ValueError as
    `solve` does.
    """
    if grid == "auto":
        grid = usual_grid(solver)
    if isinstance(grid, str):
        return make_grid(grid, times, steps)
    points = [float(t) for t in grid]
    if len(points) < 2 or points[0] > 1.0 or points[-1] < 0.0:
        raise ValueError("a grid must have two times or more, within [0, 1]")
    check_times(times)
    if any(a <= b for a, b in itertools.pairwise(points)):
        raise ValueError("a grid must descend strictly")
    for t in times:
        near = min(points[1:], key=lambda p: abs(p - t))
        if not same_time(near, t):
            raise ValueError(
                f"time {t} is not on the grid of {len(points) - 1} steps; the nearest there is {near}"
            )
    return points


def usual_grid(solver: str) -> str:
    """The grid that `auto` stands for, for a teacher without steps of its own."""
    return "fine-end" if solver == "abm3" else "uniform"


def count_evaluations(
    solver: str,
    steps: int,
    guidance_scale: float = 1.0,
    times: Sequence[float] = (0.0,),
    grid: str | Sequence[float] = "auto",
    guidance_interval: tuple[float, float] | None = None,
) -> int:
    """Network evaluations (NFE) that `solve` uses for one sample; where guidance acts it needs two at a time.

    `times` matter if they end before 0, since the intervals after the last one are not solved. For a teacher
    with its own steps, pass those as `grid`.
    """
    guidance = Guidance(guidance_scale, guidance_interval)
    check_guidance(guidance)
    visited = evaluation_times(solver, steps, times, grid)
    return len(visited) + sum(map(guidance.acts, visited))


def evaluation_times(
    solver: str, steps: int, times: Sequence[float] = (0.0,), grid: str | Sequence[float] = "auto"
) -> list[float]:
    """The times at which `solve` asks for x0, descending; a time that is asked for twice occurs twice."""
    points = grid_points(times, solver, steps, grid)
    intervals = next(i for i, point in enumerate(points) if same_time(point, float(times[-1])))
    to_the_end = intervals == len(points) - 1
    visited = points[:intervals]
    if solver in ("heun", "heun-edm"):  # both ends of each interval, except the last one's
        return sorted([*visited, *points[1 : intervals + (not to_the_end)]], reverse=True)
    if solver == "abm3" and not to_the_end:  # one more, to correct the last state
        visited = points[: intervals + 1]
    return visited


# A solver yields (t, state) at every point of the grid except its first. `clean_end` is that of `Method`.


def ddim(denoise: Denoiser, noise: Tensor, grid: Sequence[float], clean_end: bool = False) -> States:
    """First order: DDIM with eta 0 (Song et al. 2021, eq. 12)."""
    x = noise
    for t, s in itertools.pairwise(grid):
        x = _towards(denoise(x, t), x, t, s, clean_end)
        yield s, x


def heun(denoise: Denoiser, noise: Tensor, grid: Sequence[float], clean_end: bool = False) -> States:
    """Second order, two evaluations a step: Heun's method on dx / dtheta = v (Karras et al. 2022, alg. 1).

    v = (alpha x - x0) / sigma. The last interval is one DDIM step, since v loses precision as sigma vanishes.
    """
    x = noise
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        x0 = denoise(x, t)
        if i == len(grid) - 2:
            x = _towards(x0, x, t, s, clean_end)
        else:
            step = angle(s) - angle(t)
            slope = _velocity(x0, x, t)
            euler = x + step * slope
            x = x + (0.5 * step) * (slope + _velocity(denoise(euler, s), euler, s))
        yield s, x


def heun_edm(denoise: Denoiser, noise: Tensor, grid: Sequence[float], clean_end: bool = False) -> States:
    """Second order, two evaluations a step: the deterministic sampler of EDM (Karras et al. 2022, alg. 1).

    Heun's method on dy / dsigma = (y - x0) / sigma, where y = x / alpha and sigma is relative to the image. The last
    interval is one DDIM step. On EDM's own grid it gives the states of EDM's sampler: the noise is scaled by the first
    sigma, as there.
    """
    y = None
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        (alpha, scale), (next_alpha, next_scale) = _scales(t), _scales(s)
        sigma, next_sigma = scale / alpha, next_scale / next_alpha
        y = sigma * noise if y is None else y
        x0 = denoise(alpha * y, t)
        slope = (y - x0) / sigma
        if i == len(grid) - 2:
            y = x0 if clean_end and s == 0.0 else y + (next_sigma - sigma) * slope
            yield s, y if clean_end and s == 0.0 else next_alpha * y
        else:
            step = next_sigma - sigma
            euler = y + step * slope
            y = y + (0.5 * step) * (slope + (euler - denoise(next_alpha * euler, s)) / next_sigma)
            yield s, next_alpha * y


def dpmpp_2m(denoise: Denoiser, noise: Tensor, grid: Sequence[float], clean_end: bool = False) -> States:
    """Second order, one evaluation a step: DPM-Solver++(2M) (Lu et al. 2022, alg. 2).

    The first and last steps are first order: extrapolating x0 across the last, huge step in log-SNR would
    spoil the end point.
    """
    x, previous = noise, None
    last_h = math.nan
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        x0 = denoise(x, t)
        h = _half_logsnr(s) - _half_logsnr(t)
        if previous is None or i == len(grid) - 2:
            x = _towards(x0, x, t, s, clean_end)
        else:
            ratio = h / (2.0 * last_h)
            x = _towards((1.0 + ratio) * x0 - ratio * previous, x, t, s)
        previous, last_h = x0, h
        yield s, x


def abm3(denoise: Denoiser, noise: Tensor, grid: Sequence[float], clean_end: bool = False) -> States:
    """Third order, one evaluation a step: Adams-Bashforth-Moulton on dx / dtheta = v (Hairer, Norsett & Wanner,
    *Solving ODEs I*, III.1), with steps of any length.

    In the angle theta the equation has no singular end. A two-step Adams-Bashforth prediction is made over each interval,
    and corrected by the two-step Adams-Moulton formula as soon as the next evaluation, made at the predicted
    state, is known (PEC mode; Zhao et al. 2023, UniPC, use the same trick). A state is yielded corrected; the
    last one, for which no evaluation follows, as predicted.
    """
    x = noise
    start: tuple[Tensor, float] | None = None  # state and angle from which the current prediction was made
    past: list[tuple[float, Tensor]] = []  # (angle, v), newest first
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        theta = angle(t)
        x0 = denoise(x, t)
        v = _velocity(x0, x, t)
        if start is not None:
            x = _integrate(*start, theta, [(theta, v), *past])
            yield t, x
        past = [(theta, v), *past[:1]]
        start = (x, theta)
        if clean_end and s == 0.0:
            x = x0
        else:
            x = _integrate(x, theta, angle(s), past)
        if i == len(grid) - 2:
            yield s, x


SOLVERS: dict[str, Callable[[Denoiser, Tensor, Sequence[float], bool], States]] = {
    "ddim": ddim,
    "heun": heun,
    "heun-edm": heun_edm,
    "dpmpp-2m": dpmpp_2m,
    "abm3": abm3,
}


def _integrate(x: Tensor, a: float, b: float, slopes: Sequence[tuple[float, Tensor]]) -> Tensor:
    """x plus the integral from a to b of the polynomial through `slopes` (abscissa, value)."""
    weights = interpolation_weights([abscissa for abscissa, _ in slopes], a, b)
    for weight, (_, slope) in zip(weights, slopes, strict=True):
        x = x + weight * slope
    return x


def interpolation_weights(nodes: Sequence[float], a: float, b: float) -> list[float]:
    """Integrals from a to b of the Lagrange polynomials of one to three distinct nodes; exact for degree n-1."""
    middle, width = (a + b) / 2, b - a
    at = [(node - middle) / width for node in nodes]  # the interval becomes [-1/2, 1/2]: moments 1, 0, 1/12
    weights = []
    for i, z in enumerate(at):
        others = at[:i] + at[i + 1 :]
        below = math.prod(z - other for other in others)
        square = 1.0 / 12.0 if len(others) == 2 else 0.0
        above = square + math.prod(-other for other in others)
        weights.append(width * above / below)
    return weights


def _scales(t: float) -> tuple[float, float]:
    alpha, sigma = alpha_sigma(t)
    return float(alpha), float(sigma)


def _velocity(x0: Tensor, x: Tensor, t: float) -> Tensor:
    alpha, sigma = _scales(t)
    return (alpha * x - x0) / sigma


def _half_logsnr(t: float) -> float:
    alpha, sigma = _scales(t)
    return math.log(alpha) - math.log(sigma)


def _towards(x0: Tensor, x: Tensor, t: float, s: float, clean_end: bool = False) -> Tensor:
    """The state at `s` from the state at `t`, for a constant prediction x0 (a DDIM step)."""
    if clean_end and s == 0.0:
        return x0
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(t), _scales(s)
    return (sigma_s / sigma_t) * x + (alpha_s - sigma_s * alpha_t / sigma_t) * x0
