"""Denoisers by networks of diffusers, for each kind of schedule.

A state x = alpha x0 + sigma eps of ours has the ratio r = sigma / alpha. A state that is noisier or cleaner than every level
that the network knows is treated as one at the nearest of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsno_cluster.diffusion import preconditioning
from dsno_cluster.diffusion.discrete_levels import level_at
from dsno_cluster.diffusion.preconditioning import Scalings
from dsno_cluster.diffusion.predictions import clean_images
from dsno_cluster.diffusion.schedule import LOGSNR_MAX, LOGSNR_MIN, is_pure_noise, logsnr
from dsno_cluster.teachers.backbones import KNOTS, levels_of_sigmas
from dsno_cluster.teachers.diffusers_schedules import Schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def denoiser(network: Any, schedule: Schedule, dtype: torch.dtype) -> Denoise:
    """The denoiser (x, t_N, labels) -> x0 of a network whose layers are in `dtype`.

    If the network has more output channels than the image, the first ones count; the others are a variance.
    """
    if schedule.kind == "betas":
        return _of_levels(network, schedule, dtype)
    scalings, offset = _SCALINGS[schedule.kind], _shift(schedule)

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        k = scalings(schedule.values, logsnr(t_N))
        c_skip, c_out, c_in = (c.to(x.dtype)[:, None, None, None] for c in (k.c_skip, k.c_out, k.c_in))
        scaled = c_in * x + offset if offset else c_in * x
        return c_skip * x + c_out * _output(network, scaled.to(dtype), k.c_noise.float(), labels, x)

    return denoise


def scalings_of(
    schedule: Schedule,
) -> tuple[Callable[[Tensor], Scalings], tuple[float, float], int, float]:
    """How a schedule of another kind than betas uses a network, as `backbones.of_scalings` takes it.

    The coefficients at log-SNRs, the range of these, the knots of the network's times, and what is added to its input.
    """
    values = schedule.values
    levels = (LOGSNR_MIN, LOGSNR_MAX)
    if schedule.kind != "flow":
        levels = levels_of_sigmas(values["sigma_min"], values["sigma_max"])
    linear = schedule.kind == "consistency" or "log sigma" in values.get("time", "")
    of_logsnr = functools.partial(_SCALINGS[schedule.kind], values)
    return of_logsnr, levels, 2 if linear else KNOTS, _shift(schedule)


def _shift(schedule: Schedule) -> float:
    """What is added to the network's input."""
    return 0.5 if schedule.kind == "ve" else 0.0


def _of_levels(network: Any, schedule: Schedule, dtype: torch.dtype) -> Denoise:
    prediction, levels = schedule.prediction, schedule.levels

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        timestep_N, *scales = level_at(levels, t_N)
        alpha, sigma = (s.to(x.dtype)[:, None, None, None] for s in scales)
        output = _output(network, x.to(dtype), timestep_N.float(), labels, x)
        return clean_images(prediction, output, x, alpha, sigma)

    return denoise


def _output(network: Any, images: Tensor, time_N: Tensor, labels: Tensor | None, x: Tensor) -> Tensor:
    """The network's output for the image, in the dtype and shape of x."""
    import torch

    if images.is_cuda:  # not on a CPU: the bits of data sets that exist
        images = images.contiguous(memory_format=torch.channels_last)
    output: Tensor = network(images, time_N, class_labels=labels, return_dict=False)[0]
    return output[:, : x.shape[1]].to(x.dtype)


def _edm(values: dict[str, Any], level_N: Tensor) -> Scalings:
    """Karras et al. 2022, table 1, for states of ours."""
    ratio_N = _ratio(values, level_N)
    k = preconditioning.edm(ratio_N, values["sigma_data"])
    sign = -1.0 if values["prediction_type"] == "v_prediction" else 1.0
    times = {
        "log sigma / 4": lambda: k.c_noise,
        "250 log sigma": lambda: 1000 * k.c_noise,
        "2 / pi atan sigma": lambda: ratio_N.atan() * (2 / math.pi),
    }
    signed = Scalings(k.c_skip, sign * k.c_out, k.c_in, times[values["time"]]())
    return preconditioning.of_states(signed, ratio_N)


def _consistency(values: dict[str, Any], level_N: Tensor) -> Scalings:
    """Song et al. 2023, appendix C: as EDM's, moved so that the function is the identity at the lowest sigma."""
    ratio_N, data, low = _ratio(values, level_N), values["sigma_data"], values["sigma_min"]
    root = (ratio_N**2 + data**2).sqrt()
    moved = ratio_N - low
    k = Scalings(data**2 / (moved**2 + data**2), moved * data / root, 1 / root, 250 * ratio_N.log())
    return preconditioning.of_states(k, ratio_N)


def _ve(values: dict[str, Any], level_N: Tensor) -> Scalings:
    """The network is given (y + 1) / 2, whose noise is r / 2, and gives its score s there: x0 = y + r^2 s / 2."""
    ratio_N = _ratio(values, level_N)
    ones = ratio_N.new_ones(ratio_N.shape)
    return preconditioning.of_states(Scalings(ones, ratio_N**2 / 2, ones / 2, ratio_N / 2), ratio_N)


def _flow(values: dict[str, Any], level_N: Tensor) -> Scalings:
    """x0 = x_s - s v of the state x_s = (1 - s) x0 + s eps; s = 1 at t=1."""
    import torch

    ratio_N = (-0.5 * level_N).exp()
    share_N = torch.where(is_pure_noise(level_N), 1.0, ratio_N / (1 + ratio_N)).clamp(min=values["sigma_min"])
    scale_N = (share_N**2 + (1 - share_N) ** 2).sqrt()
    return Scalings(scale_N, -share_N, scale_N, values["num_train_timesteps"] * share_N)


_SCALINGS = {"edm": _edm, "consistency": _consistency, "flow": _flow, "ve": _ve}


def _ratio(values: dict[str, Any], level_N: Tensor) -> Tensor:
    return (-0.5 * level_N).exp().clamp(values["sigma_min"], values["sigma_max"])
