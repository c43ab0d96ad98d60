"""The optimiser, and the schedules by optimiser step: learning rate, EMA decay, drawn time points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from dsno_cluster.config import Training

FUSED = ("adam", "adamw")  # optimisers that torch can run as one kernel


def make_optimizer(model: nn.Module, settings: Training, *, fused: bool = False) -> torch.optim.Optimizer:
    """The torch optimiser that `training.optimizer` names; `fused` into one kernel if it can be."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "radam": torch.optim.RAdam,
    }
    more = {"fused": True} if fused and settings.optimizer in FUSED else {}
    return kinds[settings.optimizer](
        model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, **more
    )


def learning_rate(
    step: int, steps: int, lr: float, warmup: int, decay: str, halve_at: Sequence[int] = ()
) -> float:
    """Rate of optimiser step `step` (0-based) of a run of `steps`.

    Linear warm-up over min(warmup, steps) steps; then `cosine` down to 0, `halving` at each step of
    `halve_at` (as published), or `none`.
    """
    factor = min(1.0, (step + 1) / max(1, min(warmup, steps)))
    if decay == "cosine":
        factor *= 0.5 * (1.0 + math.cos(math.pi * step / steps))
    elif decay == "halving":
        factor *= 0.5 ** sum(step >= milestone for milestone in halve_at)
    return lr * factor


def drawn_points(seed: int, step: int, points: int, end_share: float, most: int) -> list[int]:
    """Positions of the time points that optimiser step `step` (0-based) sees, ascending.

    With probability `end_share` only the last (t=0); else 1 to `most` of all `points`, all sets of a size
    equally likely. Depends only on (seed, step), so it is the same on every rank and after a restart.
    """
    random = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
    if random.random() < end_share:
        return [points - 1]
    count = int(random.integers(1, most + 1))
    return sorted(random.choice(points, count, replace=False).tolist())


def ema_decay_at(step: int, decay: float, ramp: bool) -> float:
    """Decay after optimiser step `step` (0-based): min(decay, (1 + step) / (10 + step)) if ramped.

    A constant 0.9999 averages over 10 000 steps, which is useless in a shorter run.
    """
    return min(decay, (1 + step) / (10 + step)) if ramp else decay
