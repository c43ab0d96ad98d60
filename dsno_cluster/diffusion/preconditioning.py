"""Preconditioning: what goes into a network and how its output becomes a clean image (Karras et al. 2022, table 1).

A network F is used as a denoiser of y = x0 + sigma n:

    D(y; sigma) = c_skip y + c_out F(c_in y; c_noise)

The coefficients are functions of sigma, float64. A state of ours, x = alpha x0 + alpha sigma n with
alpha = 1 / sqrt(1 + sigma^2), is y = x / alpha; see `of_states`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Scalings:
    """The coefficients of a preconditioning at some sigmas, float64, each of their shape."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm(sigma: Tensor, sigma_data: float = 0.5) -> Scalings:
    """EDM's own, for data of standard deviation `sigma_data`: table 1, column "Ours", and equation 7."""
    total = sigma**2 + sigma_data**2
    root = total.sqrt()
    return Scalings(sigma_data**2 / total, sigma * sigma_data / root, 1 / root, sigma.log() / 4)


def vp(sigma: Tensor, beta_d: float = 19.9, beta_min: float = 0.1, levels: float = 1000) -> Scalings:
    """Of a network trained on the variance-preserving SDE, which knows times t in 0..levels-1: table 1, column "VP".

    sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, solved for t.
    """
    t = ((beta_min**2 + 2 * beta_d * (sigma**2).log1p()).sqrt() - beta_min) / beta_d
    return Scalings(sigma.new_ones(sigma.shape), -sigma, (1 + sigma**2).rsqrt(), (levels - 1) * t)


def ve(sigma: Tensor) -> Scalings:
    """Of a network trained on the variance-exploding SDE: table 1, column "VE"."""
    ones = sigma.new_ones(sigma.shape)
    return Scalings(ones, sigma, ones, (sigma / 2).log())


def iddpm(sigma: Tensor, levels: tuple[float, ...]) -> Scalings:
    """Of a network trained on discrete `levels`, falling to 0 at the last of them: table 1, column "iDDPM".

    The network's time is that of the nearest level, counted from the other end; sigma itself is not rounded.
    """
    ones = sigma.new_ones(sigma.shape)
    time = len(levels) - 2 - nearest_level(sigma, levels).to(sigma.dtype)
    return Scalings(ones, -sigma, (1 + sigma**2).rsqrt(), time)


def nearest_level(sigma: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Indices of the `levels`, which fall, that are nearest to the sigmas; int64."""
    import torch

    middles = middles_of_levels(levels, sigma.device)
    return len(levels) - 1 - torch.searchsorted(middles, sigma.double().contiguous())


@functools.lru_cache(maxsize=16)
def middles_of_levels(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The middles between levels, rising, as a tensor; made once, since every evaluation of the network asks for it."""
    import torch

    with torch.inference_mode(False):
        rising = torch.tensor(levels[::-1], dtype=torch.float64, device=device)
        return (rising[1:] + rising[:-1]) / 2


def of_states(scalings: Scalings, sigma: Tensor) -> Scalings:
    """The coefficients for states x = alpha y in place of y: c_skip and c_in divided by alpha."""
    root = (1 + sigma**2).sqrt()
    return replace(scalings, c_skip=scalings.c_skip * root, c_in=scalings.c_in * root)
