"""The noise schedule: the only place with log-SNR, time grids and loss weights.

Variance preserving: x_t = alpha(t) x0 + sigma(t) eps with alpha^2 = sigmoid(logsnr), sigma^2 = 1 - alpha^2.
Time runs from 1 (pure noise) to 0 (data). Everything here is computed in float64 and cast by the caller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOGSNR_MAX = 20.0
LOGSNR_MIN = -20.0

# logsnr -> time goes through an angle theta(t) = _SLOPE t + _OFFSET with alpha = cos theta, sigma = sin theta.
_OFFSET = math.atan(math.exp(-LOGSNR_MAX / 2))
_SLOPE = math.atan(math.exp(-LOGSNR_MIN / 2)) - _OFFSET


def logsnr(t: Tensor | float) -> Tensor:
    """log(alpha^2 / sigma^2) at cosine time `t` in [0, 1]; float64, shape of `t`.

    logsnr(t) = -2 log tan(a t + b), from +20 at t=0 to -20 at t=1
    (Salimans & Ho, *Progressive Distillation*, 2022, appendix; Zheng et al. 2023, section 4).
    """
    t64 = torch.as_tensor(t, dtype=torch.float64)  # keeps the device of a tensor
    return -2.0 * torch.log(torch.tan(_SLOPE * t64 + _OFFSET))


def angle(t: float) -> float:
    """theta(t) in radians: alpha = cos theta, sigma = sin theta; the ODE in it is dx / dtheta = v."""
    return _SLOPE * t + _OFFSET


def alpha_sigma(t: Tensor | float) -> tuple[Tensor, Tensor]:
    """Signal and noise scales at time `t`; float64, shape of `t`, alpha^2 + sigma^2 = 1."""
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
    proportion to their length (largest remainder, at least one each) and are equal within a stretch. Where
    `times` lie on the uniform grid of 1/steps, the result is that grid.

    Raises ValueError where `times` do not descend strictly within [0, 1) or `steps` is below their number.
    """
    check_times(times)
    ends = [*times] if times[-1] == 0.0 else [*times, 0.0]
    starts = [1.0, *ends[:-1]]
    if steps < len(ends):
        raise ValueError(f"steps={steps} is below the {len(ends)} intervals that the time points need")
    ideal = [(a - b) * steps for a, b in zip(starts, ends, strict=True)]
    counts = [max(1, math.floor(x + 1e-9)) for x in ideal]
    while sum(counts) < steps:
        counts[max(range(len(counts)), key=lambda i: (ideal[i] - counts[i], -i))] += 1
    while sum(counts) > steps:  # only where several stretches were raised to one interval
        counts[max((i for i in range(len(counts)) if counts[i] > 1), key=lambda i: counts[i] - ideal[i])] -= 1
    grid = [1.0]
    for start, end, count in zip(starts, ends, counts, strict=True):
        grid += [start + (end - start) * j / count for j in range(1, count)] + [end]
    return grid


def check_times(times: Sequence[float]) -> None:
    """Raises ValueError unless `times` descend strictly within [0, 1)."""
    ok = len(times) > 0 and times[-1] >= 0.0 and times[0] < 1.0
    if not ok or any(a <= b for a, b in itertools.pairwise(times)):
        raise ValueError(f"times {list(times)} must descend strictly, from below 1 to 0 or more")


def loss_weights(name: str, times: Sequence[float]) -> Tensor:
    """Weight of each time point in the training loss, (M,) float64.

    snr: clamp(alpha / sigma, 1, 1e4), as published (Zheng et al. 2023, section 4; its last point carries
    nearly all of the weight); sqrt: its square root; flat: 1 everywhere.
    """
    published = torch.exp(0.5 * logsnr(torch.tensor(list(times), dtype=torch.float64))).clamp(1.0, 1e4)
    weights = {"snr": published, "sqrt": published.sqrt(), "flat": torch.ones_like(published)}
    if name not in weights:
        raise ValueError(f"time weighting {name!r} is not one of: {', '.join(weights)}")
    return weights[name]
