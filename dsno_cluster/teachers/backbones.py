"""A teacher's network as a student can be built on it: the constants of its clean image at t=1, and its times.

The records are those of `networks/backbones.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsno_cluster.diffusion.preconditioning import Scalings
from dsno_cluster.diffusion.schedule import LOGSNR_MAX, LOGSNR_MIN, angle
from dsno_cluster.networks.backbones import TRANSFORMERS, AnyNetwork, Backbone, NetworkTimes

if TYPE_CHECKING:
    from torch import Tensor

KNOTS = 1025  # points of a table of times that are not linear in the log-SNR


def of_scalings(
    network: AnyNetwork,
    of_logsnr: Callable[[Tensor], Scalings],
    levels: tuple[float, float],
    knots: int = KNOTS,
    shift: float = 0.0,
) -> Backbone | None:
    """A network that is used by the coefficients for states of these log-SNRs, between two `levels`, the noisier first.

    Times that are linear in the log-SNR need two `knots`. None if the coefficients are not finite.
    """
    import torch

    level = torch.linspace(*levels, knots, dtype=torch.float64)
    k = of_logsnr(level)
    ends = torch.stack([k.c_in[0], k.c_skip[0], k.c_out[0]])
    if not bool(k.c_noise.isfinite().all() and ends.isfinite().all() and level.isfinite().all()):
        return None
    return Backbone(
        network=network,
        times=NetworkTimes(logsnr=tuple(level.tolist()), time=tuple(k.c_noise.tolist())),
        scale=float(k.c_in[0]),
        skip=float(k.c_skip[0]),
        gains=(float(k.c_out[0]),),
        shift=shift,
    )


def levels_of_sigmas(lowest: float, highest: float) -> tuple[float, float]:
    """The log-SNRs of the ends of a range of sigma = noise / image, the noisier first."""
    return -2 * math.log(highest), -2 * math.log(lowest)


def of_levels(
    network: AnyNetwork, levels: tuple[float, ...], prediction: str, time_scale: float = 1.0
) -> Backbone:
    """A network trained on discrete levels, descending log-SNRs, which takes `time_scale` times a level's number."""
    count = len(levels)
    numbers = [time_scale * n for n in reversed(range(count))]
    finite = [level for level in reversed(levels) if level > -math.inf]
    if len(finite) < count:  # the last is pure noise, a level for t=1 only
        finite = [LOGSNR_MIN + 1e-6, LOGSNR_MIN + 2e-6, *finite]
        numbers = [numbers[0], numbers[1], *numbers[1:]]
    if isinstance(network, TRANSFORMERS):
        finite, numbers = finite[:1], numbers[:1]
    noisiest = max(levels[-1], LOGSNR_MIN)
    signal = 0.0 if levels[-1] == -math.inf else 1.0 / (1.0 + math.exp(-noisiest))
    times = NetworkTimes(logsnr=tuple(finite), time=tuple(numbers))
    return of_prediction(network, times, prediction, math.sqrt(signal), math.sqrt(1.0 - signal))


def of_cosine_times(network: AnyNetwork, prediction: str) -> Backbone:
    """A network that takes log-SNRs themselves, on the cosine schedule."""
    ends = (LOGSNR_MIN, LOGSNR_MAX)
    times, theta = NetworkTimes(logsnr=ends, time=ends), angle(1.0)
    return of_prediction(network, times, prediction, math.cos(theta), math.sin(theta))


def of_prediction(
    network: AnyNetwork, times: NetworkTimes, prediction: str, alpha: float, sigma: float
) -> Backbone:
    """With the constants of `predictions.clean_images` at a noisiest state alpha x0 + sigma eps; alpha 0 is not for eps."""
    constants: dict[str, tuple[float, ...]] = {"x": (0.0, 1.0), "v": (alpha, -sigma)}
    if prediction == "eps":
        constants["eps"] = (1.0 / alpha, -sigma / alpha)
    constants["both"] = (alpha, sigma**2, -alpha * sigma)
    skip, *gains = constants[prediction]
    return Backbone(network=network, times=times, scale=1.0, skip=skip, gains=tuple(gains))
