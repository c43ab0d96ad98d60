"""Learning rate, EMA decay and losses' companions as pure functions of the optimiser step."""

from __future__ import annotations

import math
from collections.abc import Sequence


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


def ema_decay_at(step: int, decay: float, ramp: bool) -> float:
    """Decay after optimiser step `step` (0-based): min(decay, (1 + step) / (10 + step)) where ramped.

    A constant 0.9999 averages over 10 000 steps: useless in a run shorter than that.
    """
    return min(decay, (1 + step) / (10 + step)) if ramp else decay
