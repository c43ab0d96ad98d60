"""The maximum mean discrepancy by a Gaussian kernel, on a device, a block of distances at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_NUMBERS = 2**27  # kernel values at a time: 1 GiB


def squared_mmd(
    samples_ND: Tensor, real_MD: Tensor, bandwidth: float, numbers: int = BLOCK_NUMBERS
) -> tuple[float, Tensor]:
    """The squared discrepancy with k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)), and each sample's influence on it, (N,).

    The biased estimate of Gretton et al. (2012), equation 5, whose means include the pairs of a feature with itself; in float64.
    The influence is twice that of the witness function, up to a constant.
    """
    samples, real = samples_ND.double(), real_MD.double()
    among_samples = _mean_kernel(samples, samples, bandwidth, numbers)
    with_real = _mean_kernel(samples, real, bandwidth, numbers)
    among_real = _mean_kernel(real, real, bandwidth, numbers)
    found = float(among_samples.mean() + among_real.mean() - 2 * with_real.mean())
    return found, 2 * (among_samples - with_real)


def _mean_kernel(features_ND: Tensor, others_MD: Tensor, bandwidth: float, numbers: int) -> Tensor:
    """The mean of each feature's kernel with all others, (N,)."""
    import torch

    norms_M = others_MD.square().sum(dim=1)
    means = []
    for part in features_ND.split(max(1, numbers // len(others_MD))):
        squared = part.square().sum(dim=1, keepdim=True) + norms_M - 2 * part @ others_MD.T
        means.append((squared / (-2 * bandwidth**2)).exp().mean(dim=1))
    return torch.cat(means)
