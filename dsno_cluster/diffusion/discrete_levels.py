"""Noise levels of models that were trained on a finite number of them, as diffusers' schedulers define them."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

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

    def cosine(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    if scheduler["trained_betas"] is not None:
        betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        steps = [min(1 - cosine((n + 1) / count) / cosine(n / count), 0.999) for n in range(count)]
        betas = torch.tensor(steps, dtype=torch.float32)
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2, or trained_betas"
        raise UserError(f"{path}: beta_schedule {kind!r} is not one of: {known}")
    if betas.shape != (count,) or not bool(((betas > 0) & (betas < 1)).all()):
        raise UserError(f"{path}: {len(betas)} betas, {count} expected, each above 0 and below 1")
    signal = torch.cumprod(1.0 - betas, dim=0).double()
    levels = (signal / (1.0 - signal)).log()
    if not bool(levels.isfinite().all() and (levels.diff() < 0).all()):
        raise UserError(f"{path}: its betas do not make noise levels that grow strictly")
    return tuple(levels.tolist())


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
