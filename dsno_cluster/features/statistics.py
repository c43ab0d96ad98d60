"""Mergeable moments in float64, and the Fréchet distance.

Moments are merged centred (n, mean, M2), since the sum-of-squares form cancels for large means (Chan, Golub &
LeVeque 1979). The distance is torch-fidelity's own formula.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


Array = TypeVar("Array", "np.ndarray", "Tensor")


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and sum of centred outer products (D, D) of `count` feature vectors, float64."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), ddof 1, as `numpy.cov`."""
        return self.m2 / (self.count - 1)

    @property
    def gaussian(self) -> Gaussian[np.ndarray]:
        return Gaussian(self.mean, self.covariance)


@dataclass(frozen=True)
class Gaussian(Generic[Array]):
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: Array
    covariance: Array


def moments_of(features: np.ndarray) -> Moments:
    """Moments of features (N, D)."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def moments_on_device(features_ND: Tensor) -> Moments:
    """Moments of features (N, D) on a device, computed there: a GPU multiplies float64 matrices far faster than a CPU."""
    if features_ND.is_cpu:
        return moments_of(features_ND.numpy())
    return _moments_by_torch(features_ND)


def _moments_by_torch(features_ND: Tensor) -> Moments:
    features = features_ND.double()
    mean = features.mean(dim=0)
    centred = features - mean
    m2 = centred.T @ centred
    return Moments(len(features), mean.cpu().numpy(), m2.cpu().numpy())


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of all vectors together.

    The last bits depend on the order of `parts`: merge in sample order.
    """
    total: Moments | None = None
    for part in parts:
        if total is None:
            total = part
            continue
        count = total.count + part.count
        delta = part.mean - total.mean
        mean = total.mean + delta * (part.count / count)
        m2 = total.m2 + part.m2
        between = np.outer(delta, delta)
        between *= total.count * part.count / count  # in place: each such array may have 32 MiB
        m2 += between
        total = Moments(count, mean, m2)
    if total is None:
        raise ValueError("no moments to merge")
    return total


class BlockMerger:
    """Merges the moments of `blocks` blocks, which may arrive in any order.

    They are merged in a binary tree over the blocks' numbers, so no bit depends on the order of arrival, and
    few have to wait: each pair in the tree is merged as soon as it is complete.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.waiting: dict[tuple[int, int], Moments] = {}  # by level and place in it

    def add(self, block: int, moments: Moments) -> None:
        """Add the moments of a block, each block once."""
        level, place = 0, block
        while (1 << level) < self.blocks:
            neighbour = place ^ 1
            if neighbour << level < self.blocks:  # there is one to merge with
                other = self.waiting.pop((level, neighbour), None)
                if other is None:
                    break
                moments = merge([moments, other] if place < neighbour else [other, moments])
            level, place = level + 1, place // 2
        self.waiting[level, place] = moments

    def result(self) -> Moments:
        """The moments of all blocks. Raises ValueError if blocks are missing."""
        if len(self.waiting) != 1 or 1 << next(iter(self.waiting))[0] < self.blocks:
            raise ValueError("blocks are missing")
        return next(iter(self.waiting.values()))


def distance_from(samples: Moments, reference: Gaussian[np.ndarray]) -> float:
    """The Frechet distance of samples from a reference.

    Raises UserError if features on either side are not finite.
    """
    for what, spread in (("the samples", samples.m2), ("the reference", reference.covariance)):
        if not np.isfinite(spread).all():
            raise UserError(
                f"evaluation.feature_extractor: its features of {what} are not finite; are its weights damaged?"
            )
    return frechet_distance(samples.mean, samples.covariance, reference.mean, reference.covariance)


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """||mean_1 - mean_2||^2 + tr(cov_1 + cov_2 - 2 sqrt(cov_1 cov_2)), by torch-fidelity (Heusel et al. 2017)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    first = {"mu": np.asarray(mean_1, np.float64), "sigma": np.asarray(cov_1, np.float64)}
    second = {"mu": np.asarray(mean_2, np.float64), "sigma": np.asarray(cov_2, np.float64)}
    return float(fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID])
