"""How far a distance would move if other samples were drawn: half the width of its 95 % interval.

The reference counts as fixed, as it is in a benchmark, except where a function says otherwise.
"""

from __future__ import annotations

import math

import numpy as np

from dsno_cluster.features.statistics import Gaussian, Moments
from dsno_cluster.features.transport import as_tensors, root_of, transport

Z_95 = 1.959964  # 95 % of a normal distribution lies within this many standard deviations of its mean
ROWS = 4096  # features at a time


def of_mean(influence_N: np.ndarray) -> float:
    """That of a figure on which sample i has the influence (N,), so that it moves as the mean of the influences does.

    This is the infinitesimal jackknife, to which the bootstrap of the samples converges without drawing any (Efron 1982, The
    Jackknife, the Bootstrap and Other Resampling Plans, section 6).
    """
    return _rounded(Z_95 * influence_N.std(ddof=1) / math.sqrt(len(influence_N)))


def _rounded(half_width: float) -> float:
    """To six digits, far more than it is known to: the last bits of a decomposition depend on the number of threads."""
    return float(f"{half_width:.6g}")


def of_frechet_distance(
    features_ND: np.ndarray, samples: Moments, reference: Gaussian[np.ndarray]
) -> float | None:
    """That of the Frechet distance of features (N, D), of which `samples` are the moments, from a reference's.

    None if there are not more samples than features, whose covariance then has no inverse.

    With z = x - m, the influence of x is 2 (m - m_r).z + z'(I - T) z up to a constant, since the derivatives of the distance are
    2 (m - m_r) by the mean m and I - T by the covariance C; T is the map of `transport` from the samples' Gaussian to the
    reference's.
    """
    if samples.count <= len(samples.mean):
        return None
    target = as_tensors(reference)
    to_reference = transport(as_tensors(samples.gaussian), target, root_of(target.covariance)).map.numpy()
    slope = np.eye(len(samples.mean)) - to_reference
    shift = samples.mean - reference.mean
    influence = []
    for start in range(0, len(features_ND), ROWS):
        centred = features_ND[start : start + ROWS] - samples.mean
        quadratic = np.einsum("nd,nd->n", centred @ slope, centred)
        influence.append(2 * centred @ shift + quadratic)
    return of_mean(np.concatenate(influence))


def of_subsets(deviation: float, subsets: int, size: int, count: int) -> float | None:
    """That of a mean over `subsets` random subsets of `size` among `count`, whose values have this deviation, by N.

    None of a single subset, or if one is more than half of all: then they are too much alike to tell. The deviation of
    a subset drawn without replacement is smaller than that of `size` new samples by the factor (1 - size/count)^(1/2); that
    of all `count` is smaller by (size/count)^(1/2) (subsampling: Politis, Romano & Wolf 1999). If subsets are drawn from both
    sides, the interval covers both.
    """
    if subsets < 2 or 2 * size > count:
        return None
    share, of_subset = size / count, deviation * math.sqrt(subsets / (subsets - 1))
    return _rounded(Z_95 * of_subset * math.sqrt(share / (1 - share) + 1 / subsets))
