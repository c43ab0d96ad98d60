"""Noise levels of models that were trained on a finite number of them: those of diffusers' schedulers, and of OpenAI's
models and DiT, which compute the same schedules in float64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsno_cluster.diffusion.schedule import is_pure_noise, logsnr, time_of_angle
from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def noise_levels(scheduler: dict[str, Any], path: str) -> tuple[float, ...]:
    """log(abar_n / (1 - abar_n)), strictly descending, (num_train_timesteps,).

    Betas and abar are float32, as in diffusers, because the model was trained on those (1 - abar_0 has a
    relative error of 2e-4); squaredcos_cap_v2 is that of Nichol & Dhariwal 2021, eq. 17. With
    `rescale_betas_zero_snr` the last level is pure noise, -inf (Lin et al. 2024, algorithm 1).
    """
    import torch

    count, kind = scheduler["num_train_timesteps"], scheduler["beta_schedule"]
    start, end = scheduler["beta_start"], scheduler["beta_end"]
    if scheduler["trained_betas"] is not None:
        betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float32) ** 2
    elif kind == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, count)) * (end - start) + start
    elif kind in _SIGNALS:
        betas = torch.tensor(_betas_of_signal(_SIGNALS[kind], count), dtype=torch.float32)
    else:
        known = ", ".join(("linear", "scaled_linear", "sigmoid", *_SIGNALS))
        raise UserError(f"{path}: beta_schedule {kind!r} is not one of: {known}, or trained_betas")
    if betas.shape != (count,) or not bool(((betas > 0) & (betas < 1)).all()):
        raise UserError(f"{path}: {len(betas)} betas, {count} expected, each above 0 and below 1")
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
    levels = _levels(_rescaled_to_zero_snr(betas) if zero_snr else betas)
    finite = levels[:-1] if zero_snr else levels
    if not bool(finite.isfinite().all() and (levels.diff() < 0).all()):
        raise UserError(f"{path}: its betas do not make noise levels that grow strictly")
    return tuple(levels.tolist())


def _rescaled_to_zero_snr(betas: Tensor) -> Tensor:
    """Betas whose last abar is 0: the square roots of abar are shifted by their last, and scaled to keep their first."""
    import torch

    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    signal = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return 1.0 - torch.cat([signal[:1], signal[1:] / signal[:-1]])


def openai_levels(beta_schedule: str, count: int) -> tuple[float, ...]:
    """log(abar_n / (1 - abar_n)), strictly descending, (count,); `beta_schedule` is linear or cosine.

    linear: betas from 0.0001 to 0.02 for 1000 levels, times 1000 / count for others (Nichol & Dhariwal 2021, section 4);
    cosine: their eq. 17.
    """
    import torch

    if beta_schedule == "cosine":
        betas = torch.tensor(_betas_of_signal(_cosine_signal, count), dtype=torch.float64)
    else:
        scale = 1000 / count
        betas = torch.linspace(0.0001 * scale, 0.02 * scale, count, dtype=torch.float64)
    return tuple(_levels(betas).tolist())


def _cosine_signal(fraction: float) -> float:
    return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_signal(fraction: float) -> float:
    half = 0.5 - fraction
    ratio = math.exp(-0.5 * math.copysign(1, half) * math.log(1 - 2 * abs(half) + 1e-6))
    return math.sqrt(ratio / (1 + ratio))


# Schedules that diffusers defines by the signal that is left at a fraction of the way.
_SIGNALS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine_signal,
    "laplace": _laplace_signal,
    "exp": lambda fraction: math.exp(-12.0 * fraction),
}


def _betas_of_signal(signal: Callable[[float], float], count: int) -> list[float]:
    return [min(1 - signal((n + 1) / count) / signal(n / count), 0.999) for n in range(count)]


def _levels(betas: Tensor) -> Tensor:
    """Log-SNRs, float64; products of betas are rounded to their dtype."""
    import torch

    signal = torch.cumprod(1.0 - betas, dim=0).double()
    return (signal / (1.0 - signal)).log()


def respaced_timesteps(count: int, steps: int, spacing: str) -> list[int]:
    """`steps` of the timesteps 0..count-1, descending, as OpenAI's samplers choose them (Nichol & Dhariwal 2021, section 4).

    even: from the first to the last, rounded ("250" on the command line of the original); ddim: whole strides from the
    first ("ddim250"). Raises ValueError if there are not so many, or no whole stride gives that number.
    """
    if not 1 <= steps <= count:
        raise ValueError(f"{steps} steps, but the model has {count} levels of its own; take fewer")
    if spacing == "even":
        stride = (count - 1) / max(steps - 1, 1)
        # added up, as in the original: a product would round some halves to the other side
        sums = itertools.accumulate([0.0] + [stride] * (steps - 1))
        return [round(timestep) for timestep in sums][::-1]
    taken = {len(range(0, count, stride)): stride for stride in range(count, 0, -1)}
    if steps not in taken:
        near = sorted(sorted(taken, key=lambda number: abs(number - steps))[:4])
        raise ValueError(
            f"{steps} steps, but no whole stride through the {count} levels takes that many; {', '.join(map(str, near))} do"
        )
    return [*range(0, count, taken[steps])][::-1]


def native_timesteps(levels: tuple[float, ...], spacing: str) -> Callable[[int], tuple[float, ...]]:
    """The times of some of the model's levels, as `respaced_timesteps` chooses them, then 0."""

    def grid(steps: int) -> tuple[float, ...]:
        timesteps = respaced_timesteps(len(levels), steps, spacing)
        return (*(time_of_angle(math.atan(math.exp(-levels[n] / 2))) for n in timesteps), 0.0)

    return grid


def level_at(levels: tuple[float, ...], t_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The timestep, alpha and sigma (float64, shape of t) of the model's level at cosine times; beyond all, of the nearest."""
    import torch

    level_N = _nearest(levels, logsnr(t_N))
    return timesteps_at(levels, level_N), torch.sigmoid(level_N).sqrt(), torch.sigmoid(-level_N).sqrt()


def timesteps_at(levels: tuple[float, ...], logsnr: Tensor) -> Tensor:
    """Real-valued timesteps for log-SNRs of any shape, given the model's descending `levels`; float64.

    They are interpolated linearly in log-SNR; outside the levels, the nearest level is taken. A last level that is pure
    noise is taken at t=1 only.
    """
    import torch

    finite = levels[:-1] if levels[-1] == -math.inf else levels
    ascending = ascending_levels(finite, logsnr.device)
    last = len(ascending) - 1
    level = logsnr.double().clamp(finite[-1], finite[0]).contiguous()
    upper = torch.searchsorted(ascending, level).clamp(1, last)
    part = (level - ascending[upper - 1]) / (ascending[upper] - ascending[upper - 1])
    timestep = last - (upper - 1 + part)
    if finite is levels:
        return timestep
    return torch.where(is_pure_noise(logsnr), float(len(finite)), timestep)


def _nearest(levels: tuple[float, ...], logsnr: Tensor) -> Tensor:
    """Log-SNRs, moved into the range of the levels; float64, shape of `logsnr`."""
    import torch

    if levels[-1] > -math.inf:
        return logsnr.clamp(levels[-1], levels[0])
    return torch.where(is_pure_noise(logsnr), -math.inf, logsnr.clamp(levels[-2], levels[0]))


@functools.lru_cache(maxsize=16)
def ascending_levels(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The levels as a tensor, made once: every evaluation of the network asks for it."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(levels[::-1], dtype=torch.float64, device=device)
