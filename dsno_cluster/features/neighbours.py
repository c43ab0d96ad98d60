"""Nearest neighbours on a device, a block of distances at a time; precision and recall by them.

The definition of precision and recall is torch-fidelity's: a feature is covered if it lies within the ball of one of the other
set's features, whose radius is the distance to its k-th neighbour in its own set (Kynkaanniemi et al. 2019, section 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_NUMBERS = 2**28  # distances at a time: 1 GiB


def precision_recall_on(
    samples_ND: Tensor, real_MD: Tensor, neighborhood: int, numbers: int = BLOCK_NUMBERS
) -> dict[str, float]:
    """`precision`, `recall` and `f_score` of features on one device, `numbers` distances at a time."""
    radii_N, radii_M = (radii(features, neighborhood, numbers) for features in (samples_ND, real_MD))
    recall = covered(real_MD, samples_ND, radii_N, numbers)
    precision = covered(samples_ND, real_MD, radii_M, numbers)
    f_score = 2 * precision * recall / max(1e-5, precision + recall)
    return {"precision": precision, "recall": recall, "f_score": f_score}


def radii(features_ND: Tensor, neighborhood: int, numbers: int) -> Tensor:
    """The distance of each feature to its k-th neighbour, itself not counted, (N,)."""
    import torch

    nearest = [
        part.kthvalue(neighborhood + 1).values for part in distances(features_ND, features_ND, numbers)
    ]
    return torch.cat(nearest)


def covered(features_ND: Tensor, centres_MD: Tensor, radii_M: Tensor, numbers: int) -> float:
    """The share of features that lie within the ball of at least one centre."""
    import torch

    within = [(part <= radii_M).any(dim=1) for part in distances(features_ND, centres_MD, numbers)]
    return float(torch.cat(within).double().mean())


def nearest(features_ND: Tensor, others_MD: Tensor, numbers: int = BLOCK_NUMBERS) -> tuple[Tensor, Tensor]:
    """The distance of each feature to the nearest of the others, float64 (N,), and the index of that one, (N,).

    The blocks of distances only choose it: as sums of products they lose the digits of small distances, of copies above all.
    Its own distance is that of the difference.
    """
    import torch

    index_N = torch.cat([part.argmin(dim=1) for part in distances(features_ND, others_MD, numbers)])
    rows = max(1, numbers // features_ND.shape[1])
    parts = zip(features_ND.split(rows), index_N.split(rows), strict=True)
    found = [(part.double() - others_MD[index].double()).square().sum(dim=1).sqrt() for part, index in parts]
    return torch.cat(found), index_N


def distances(features_ND: Tensor, others_MD: Tensor, numbers: int) -> Iterator[Tensor]:
    """Euclidean distances of some features at a time to all others, (n, M)."""
    import torch

    for part in features_ND.split(max(1, numbers // len(others_MD))):
        yield torch.cdist(part, others_MD)
