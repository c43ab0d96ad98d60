"""The noise levels through which diffusers' schedulers step, as `set_timesteps` of each of them chooses them.

A ratio is sigma / alpha: the standard deviation of the noise relative to the image. Ratios descend, and do not include the
0 at the end of a sampler's way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SPACINGS = ("leading", "trailing", "linspace")


def times_of_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """Cosine times of ratios, then 0."""
    from dsno_cluster.diffusion.schedule import time_of_angle

    return (*(time_of_angle(math.atan(ratio)) for ratio in ratios), 0.0)


def spaced_timesteps(count: int, steps: int, spacing: str, offset: int) -> list[float]:
    """`steps` of the timesteps 0..count-1, descending; with linspace they need not be whole numbers.

    Lin et al. 2024, table 2. Raises ValueError if there are not so many.
    """
    _check_steps(steps, count)
    if spacing == "leading":
        timesteps = [float(i * (count // steps) + offset) for i in reversed(range(steps))]
    elif spacing == "trailing":
        timesteps = [float(round(count - i * count / steps) - 1) for i in range(steps)]
    else:
        timesteps = [i * (count - 1) / max(steps - 1, 1) for i in reversed(range(steps))]
    _check_first(timesteps[0], count, steps, offset)
    return timesteps


def spaced_timesteps_without_last(
    count: int, steps: int, spacing: str, offset: int, last: int | None = None
) -> list[int]:
    """`steps` of the timesteps 0..last-1, descending: those of `steps + 1` without the first level, except for trailing.

    These are the timesteps of diffusers' multistep solvers. `last` is `count` unless the noisiest levels are left out.
    Raises ValueError if there are not so many.
    """
    last = count if last is None else last
    _check_steps(steps, last - 1)
    if spacing == "leading":
        timesteps = [i * (last // (steps + 1)) + offset for i in range(steps, 0, -1)]
    elif spacing == "trailing":
        stride = count / steps
        timesteps = [round(last - i * stride) - 1 for i in range(math.ceil(last / stride))]
    else:
        timesteps = [round(i * (last - 1) / steps) for i in range(steps, 0, -1)]
    _check_first(timesteps[0], count, steps, offset)
    return timesteps


def at_timesteps(levels: Sequence[float], timesteps: Sequence[float]) -> list[float]:
    """Ratios at real-valued timesteps, interpolated linearly between those of the levels, which are log-SNRs."""

    def ratio(timestep: float) -> float:
        below = min(int(timestep), len(levels) - 1)
        lower = math.exp(-levels[below] / 2)
        part = timestep - below
        return lower if part == 0 else lower + part * (math.exp(-levels[below + 1] / 2) - lower)

    return [ratio(timestep) for timestep in timesteps]


def exponential_ratios(steps: int, low: float, high: float) -> tuple[float, ...]:
    """`steps` ratios from `high` to `low`, equally spaced in their logarithm; a single one is `high`."""
    stride = math.log(low / high) / max(steps - 1, 1)
    return tuple(high * math.exp(i * stride) for i in range(steps))


def flow_sigmas(steps: int, low: float, shift: float, stretched_to: float | None) -> list[float]:
    """`steps` shares of noise sigma of a linear path (1 - sigma) x0 + sigma eps, from 1 towards `low`, then shifted.

    Esser et al. 2024, equation 23. diffusers shifts them even though `low` is shifted already. `stretched_to`: the
    last of them is moved there, the others in proportion.
    """
    equal = [1 + i * (low - 1) / max(steps - 1, 1) for i in range(steps)]
    sigmas = [shifted(sigma, shift) for sigma in equal]
    if not stretched_to:
        return sigmas
    scale = (1 - sigmas[-1]) / (1 - stretched_to)
    if scale == 0:
        raise ValueError(f"{steps} step, but shift_terminal needs two or more")
    return [1 - (1 - sigma) / scale for sigma in sigmas]


def multistep_flow_sigmas(steps: int, count: int, shift: float, first: float) -> list[float]:
    """As `flow_sigmas`, in the way of diffusers' multistep solvers: from `first` by equal steps; `count` training timesteps."""
    return [shifted(first - (1 - 1 / count) * i / steps, shift) for i in range(steps)]


def shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _check_steps(steps: int, count: int) -> None:
    if not 1 <= steps <= count:
        raise ValueError(f"{steps} steps, but the model has {count} levels of its own; take fewer")


def _check_first(first: float, count: int, steps: int, offset: int) -> None:
    if first >= count:
        raise ValueError(f"{steps} steps with steps_offset {offset} go beyond the {count} levels")
