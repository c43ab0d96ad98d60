"""The noise schedule: the only place with log-SNR, time grids and loss weights.

Variance preserving: x_t = alpha(t) x0 + sigma(t) eps with alpha^2 = sigmoid(logsnr), sigma^2 = 1 - alpha^2.
Time runs from 1 (pure noise) to 0 (data). Everything here is computed in float64 and cast by the caller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOGSNR_MAX = 20.0
LOGSNR_MIN = -20.0
TIME_TOLERANCE = 1e-7

# logsnr -> time goes through an angle theta(t) = _SLOPE t + _OFFSET with alpha = cos theta, sigma = sin theta.
_OFFSET = math.atan(math.exp(-LOGSNR_MAX / 2))
_SLOPE = math.atan(math.exp(-LOGSNR_MIN / 2)) - _OFFSET


def logsnr(t: Tensor | float) -> Tensor:
    """log(alpha^2 / sigma^2) at cosine time `t` in [0, 1]; float64, shape of `t`.

    logsnr(t) = -2 log tan(a t + b), from +20 at t=0 to -20 at t=1
    (Salimans & Ho, *Progressive Distillation*, 2022, appendix; Zheng et al. 2023, section 4).
    """
    import torch

    t64 = torch.as_tensor(t, dtype=torch.float64)  # keeps the device of a tensor
    return -2.0 * torch.log(torch.tan(_SLOPE * t64 + _OFFSET))


def logsnr_at(t: float) -> float:
    """`logsnr` of a number, without torch."""
    return -2.0 * math.log(math.tan(angle(t)))


def is_pure_noise(logsnr: Tensor) -> Tensor:
    """Whether each log-SNR is that of t=1; boolean, shape of `logsnr`.

    A model that knows pure noise as a level of its own (a flow, or betas with zero terminal SNR) starts there.
    """
    return logsnr <= LOGSNR_MIN + 1e-6


def angle(t: float) -> float:
    """theta(t) in radians: alpha = cos theta, sigma = sin theta; the ODE in it is dx / dtheta = v."""
    return _SLOPE * t + _OFFSET


def noise_level(t: float) -> float:
    """sigma / alpha at cosine time t: the noise relative to the image, as EDM measures it."""
    return math.tan(angle(t))


def time_of_angle(theta: float) -> float:
    """The cosine time in [0, 1] whose angle is nearest to theta; sigma / alpha is tan theta."""
    return min(max((theta - angle(0.0)) / (angle(1.0) - angle(0.0)), 0.0), 1.0)


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> tuple[float, ...]:
    """`steps` ratios sigma / alpha that fall from `sigma_max` to `sigma_min`; a single one is `sigma_max`.

    Karras et al. 2022, equation 5, without the 0 at its end.
    """
    if steps == 1:
        return (sigma_max,)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return tuple((high + i / (steps - 1) * (low - high)) ** rho for i in range(steps))


def flow_scales(t: Tensor | float) -> tuple[Tensor, Tensor]:
    """(u, scale) of a linear path x_u = u x0 + (1 - u) eps at cosine time `t`: x_u = scale * x_t; float64, shape of `t`.

    u = alpha / (alpha + sigma) has the same ratio of noise to data, so that scale = 1 / (alpha + sigma)
    (Ma et al. 2024, *SiT*, section 2, with their time reversed). An Euler step of the velocity v = x0 - eps from u to w
    leads to x_u + (w - u) v = w x0 + (1 - w) eps, with x0 = x_u + (1 - u) v and eps = x_u - u v: it is DDIM's step.
    """
    alpha, sigma = alpha_sigma(t)
    return alpha / (alpha + sigma), 1.0 / (alpha + sigma)


def flow_grid(steps: int) -> tuple[float, ...]:
    """Cosine times of `steps` equal intervals in the time u of a linear path, descending to 0."""
    inside = [time_of_angle(math.atan2(steps - i, i)) for i in range(steps)]
    return (*inside, 0.0)


def alpha_sigma(t: Tensor | float) -> tuple[Tensor, Tensor]:
    """Signal and noise scales at time `t`; float64, shape of `t`, alpha^2 + sigma^2 = 1."""
    import torch

    value = logsnr(t)
    return torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt()


def time_points(spacing: str, points: int) -> tuple[float, ...]:
    """`points` times in descending order, ending at 0 (the published grids, without t=1).

    quadratic: t_i = ((M - i) / M)^2 (CIFAR-10); uniform: t_i = (M - i) / M (ImageNet-64), i = 1..M.
    """
    fractions = [(points - i) / points for i in range(1, points + 1)]
    if spacing == "uniform":
        return tuple(fractions)
    if spacing == "quadratic":
        return tuple(f * f for f in fractions)
    raise ValueError(f"spacing {spacing!r} is not one of: quadratic, uniform")


def refine(times: Sequence[float], steps: int) -> list[float]:
    """A grid of `steps` intervals from t=1 down to t=0 that passes exactly through every one of `times`.

    The intervals are shared out between the stretches [1, times[0]], [times[0], times[1]], ..., [.., 0] in
    proportion to their length (largest remainder, at least one each) and are equal within a stretch. If
    `times` lie on the uniform grid of 1/steps, the result is that grid.

    Raises ValueError if `times` do not descend strictly within [0, 1) or `steps` is below their number.
    """
    check_times(times)
    return _between(_stretches(times), [a - b for a, b in _stretches(times)], steps, last_power=1.0)


FINE_END = 1 / 16


def fine_end(times: Sequence[float], steps: int) -> list[float]:
    """Like `refine`, but with twice the share below t = 1/16, and steps that shrink towards t=0 there.

    The ODE bends most near the data. Within that last stretch, from t0 down to 0, point j of n is
    t0 (1 - j/n)^1.5; it starts at the lowest of `times` if that lies in (0, 1/8], else at 1/16. Above it
    equal steps are kept on purpose: a denoiser's level embedding oscillates in t (the fastest term of the usual one has
    about 160 periods from t=1 to t=0), and a grid of steadily changing steps passes through lengths that are
    a whole number of periods, where the oscillation is not averaged out (measured: benchmarks/solvers.py).

    Raises ValueError as `refine` does; up to one interval more than time points may be needed.
    """
    check_times(times)
    stretches = _stretches(times)
    start, end = stretches[-1]
    if end == 0.0 and start > 2 * FINE_END:
        stretches[-1:] = [(start, FINE_END), (FINE_END, 0.0)]
    shares = [a - b for a, b in stretches]
    shares[-1] *= 2.0
    return _between(stretches, shares, steps, last_power=1.5)


def _stretches(times: Sequence[float]) -> list[tuple[float, float]]:
    ends = [*times] if times[-1] == 0.0 else [*times, 0.0]
    return list(zip([1.0, *ends[:-1]], ends, strict=True))


def _between(
    stretches: Sequence[tuple[float, float]], shares: Sequence[float], steps: int, last_power: float
) -> list[float]:
    if steps < len(stretches):
        raise ValueError(f"steps={steps} is below the {len(stretches)} intervals that the time points need")
    total = sum(shares)
    ideal = [share / total * steps for share in shares]
    counts = [max(1, math.floor(x + 1e-9)) for x in ideal]
    while sum(counts) < steps:
        counts[max(range(len(counts)), key=lambda i: (ideal[i] - counts[i], -i))] += 1
    while sum(counts) > steps:  # only if several stretches were raised to one interval
        counts[max((i for i in range(len(counts)) if counts[i] > 1), key=lambda i: counts[i] - ideal[i])] -= 1
    grid = [1.0]
    for (start, end), count in zip(stretches, counts, strict=True):
        if end == 0.0 and last_power != 1.0:
            grid += [start * (1.0 - j / count) ** last_power for j in range(1, count)] + [end]
        else:
            grid += [start + (end - start) * j / count for j in range(1, count)] + [end]
    return grid


def make_grid(name: str, times: Sequence[float], steps: int) -> list[float]:
    """The grid of that name through `times`. Raises ValueError for an unknown one."""
    grids = {"uniform": refine, "fine-end": fine_end}
    if name not in grids:
        raise ValueError(f"grid {name!r} is not one of: {', '.join(grids)}")
    return grids[name](times, steps)


def check_times(times: Sequence[float]) -> None:
    """Raises ValueError unless `times` descend strictly within [0, 1)."""
    ok = len(times) > 0 and times[-1] >= 0.0 and times[0] < 1.0
    if not ok or any(a <= b for a, b in itertools.pairwise(times)):
        raise ValueError(f"times {list(times)} must descend strictly, from below 1 to 0 or more")


def same_time(a: float, b: float) -> bool:
    """Whether two times are equal up to rounding, to float32 or between formulas of the same grid."""
    return abs(a - b) <= TIME_TOLERANCE


def same_times(a: Sequence[float], b: Sequence[float]) -> bool:
    """`same_time` for each pair."""
    return len(a) == len(b) and all(map(same_time, a, b))


def loss_weights(name: str, times: Sequence[float]) -> Tensor:
    """Weight of each time point in the training loss, (M,) float64.

    snr: clamp(alpha / sigma, 1, 1e4), as published (Zheng et al. 2023, section 4; its last point carries
    nearly all of the weight); sqrt: its square root; flat: 1 everywhere.
    """
    import torch

    published = torch.exp(0.5 * logsnr(torch.tensor(list(times), dtype=torch.float64))).clamp(1.0, 1e4)
    weights = {"snr": published, "sqrt": published.sqrt(), "flat": torch.ones_like(published)}
    if name not in weights:
        raise ValueError(f"time weighting {name!r} is not one of: {', '.join(weights)}")
    return weights[name]
