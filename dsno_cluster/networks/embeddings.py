"""Sines and cosines of a noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LONGEST_PERIOD = 10_000.0


def cosines_and_sines(time_N: Tensor, features: int) -> Tensor:
    """cos(w t), then sin(w t), for features / 2 frequencies w from 1 down to almost 1/10000; (N, features) float32.

    w_i = 10000^(-i / (features / 2)); an odd number of features ends with 0
    (Ho et al. 2020, as Nichol & Dhariwal 2021 and Peebles & Xie 2023 use it).
    """
    half = features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=time_N.device) / half
    angle = time_N.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
    waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return torch.nn.functional.pad(waves, (0, features % 2))
