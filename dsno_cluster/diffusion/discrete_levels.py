"""Noise levels of models that were trained on a finite number of them: those of diffusers' schedulers, and of OpenAI's
models and DiT, which compute the same schedules in float64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsno_cluster.diffusion.schedule import logsnr, time_of_angle
from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def noise_levels(scheduler: dict[str, Any], path: str) -> tuple[float, ...]:
    """log(abar_n / (1 - abar_n)), strictly descending, (num_train_timesteps,).

    Betas and abar are float32, as in diffusers, because the model was trained on those (1 - abar_0 has a
    relative error of 2e-4); squaredcos_cap_v2 is that of Nichol & Dhariwal 2021, eq. 17.
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
    elif kind == "squaredcos_cap_v2":
        betas = torch.tensor(_cosine_betas(count), dtype=torch.float32)
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2, or trained_betas"
        raise UserError(f"{path}: beta_schedule {kind!r} is not one of: {known}")
    if betas.shape != (count,) or not bool(((betas > 0) & (betas < 1)).all()):
        raise UserError(f"{path}: {len(betas)} betas, {count} expected, each above 0 and below 1")
    levels = _levels(betas)
    if not bool(levels.isfinite().all() and (levels.diff() < 0).all()):
        raise UserError(f"{path}: its betas do not make noise levels that grow strictly")
    return tuple(levels.tolist())


def openai_levels(beta_schedule: str, count: int) -> tuple[float, ...]:
    """log(abar_n / (1 - abar_n)), strictly descending, (count,); `beta_schedule` is linear or cosine.

    linear: betas from 0.0001 to 0.02 for 1000 levels, times 1000 / count for others (Nichol & Dhariwal 2021, section 4);
    cosine: their eq. 17.
    """
    import torch

    if beta_schedule == "cosine":
        betas = torch.tensor(_cosine_betas(count), dtype=torch.float64)
    else:
        scale = 1000 / count
        betas = torch.linspace(0.0001 * scale, 0.02 * scale, count, dtype=torch.float64)
    return tuple(_levels(betas).tolist())


def _cosine_betas(count: int) -> list[float]:
    def cosine(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - cosine((n + 1) / count) / cosine(n / count), 0.999) for n in range(count)]


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

    level_N = logsnr(t_N).clamp(levels[-1], levels[0])
    return timesteps_at(levels, level_N), torch.sigmoid(level_N).sqrt(), torch.sigmoid(-level_N).sqrt()


def timesteps_at(levels: tuple[float, ...], logsnr: Tensor) -> Tensor:
    """Real-valued timesteps for log-SNRs of any shape, given the model's descending `levels`; float64.

    They are interpolated linearly in log-SNR; outside the levels, the nearest level is taken.
    """
    import torch

    ascending = _ascending(levels, logsnr.device)
    last = len(ascending) - 1
    level = logsnr.double().clamp(levels[-1], levels[0]).contiguous()
    upper = torch.searchsorted(ascending, level).clamp(1, last)
    part = (level - ascending[upper - 1]) / (ascending[upper] - ascending[upper - 1])
    return last - (upper - 1 + part)


@functools.lru_cache(maxsize=16)
def _ascending(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The levels as a tensor, made once: every evaluation of the network asks for it."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(levels[::-1], dtype=torch.float64, device=device)
