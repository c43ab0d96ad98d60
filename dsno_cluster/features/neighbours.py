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
ROUNDED_ROWS = 10_000  # features on either side of a block of rounded distances, as in ADM's evaluator


def precision_recall_on(
    samples_ND: Tensor, real_MD: Tensor, neighborhood: int, numbers: int = BLOCK_NUMBERS
) -> dict[str, float]:
    """`precision`, `recall` and `f_score` of features on one device, `numbers` distances at a time."""
    radii_N, radii_M = (radii(features, neighborhood, numbers) for features in (samples_ND, real_MD))
    recall = covered(real_MD, samples_ND, radii_N, numbers)
    precision = covered(samples_ND, real_MD, radii_M, numbers)
    return _figures(precision, recall)


def rounded_precision_recall_on(
    samples_ND: Tensor, real_MD: Tensor, neighborhood: int, rows: int = ROUNDED_ROWS
) -> dict[str, float]:
    """The same of squared distances in 16 bits, as ADM's evaluator compares them (evaluator.py of guided-diffusion).

    It takes the distances of real features from samples, in this order, for both: rounded, they are not symmetric.
    """
    import torch

    radii_N, radii_M = (_rounded_radii(features, neighborhood, rows) for features in (samples_ND, real_MD))
    samples_in = torch.zeros(len(samples_ND), dtype=torch.bool, device=samples_ND.device)
    real_in = torch.zeros(len(real_MD), dtype=torch.bool, device=real_MD.device)
    for i in range(0, len(real_MD), rows):
        for j in range(0, len(samples_ND), rows):
            block = rounded_distances(real_MD[i : i + rows], samples_ND[j : j + rows])
            real_in[i : i + rows] |= (block <= radii_N[j : j + rows]).any(dim=1)
            samples_in[j : j + rows] |= (block <= radii_M[i : i + rows, None]).any(dim=0)
    return _figures(float(samples_in.double().mean()), float(real_in.double().mean()))


def _figures(precision: float, recall: float) -> dict[str, float]:
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


def rounded_distances(features_ND: Tensor, others_MD: Tensor) -> Tensor:
    """Squared distances (N, M), float32, each operation rounded to 16 bits; to 32 bits if one of them is too large for 16."""
    found = _squared_distances(features_ND.half(), others_MD.half())
    if not found.isfinite().all():
        found = _squared_distances(features_ND, others_MD)
    return found.float()


def _squared_distances(u_ND: Tensor, v_MD: Tensor) -> Tensor:
    """|u|^2 - 2 uv + |v|^2, each operation rounded to the type of the features; sums are of 32 bits, as on a GPU."""
    kind = u_ND.dtype
    norms_N, norms_M = (x.square().float().sum(dim=1).to(kind) for x in (u_ND, v_MD))
    found = (u_ND.float() @ v_MD.float().T).to(kind)
    return found.mul_(-2).add_(norms_N[:, None]).add_(norms_M).clamp_(min=0)


def _rounded_radii(features_ND: Tensor, neighborhood: int, rows: int) -> Tensor:
    """The squared distance of each feature to its k-th neighbour, itself not counted, (N,)."""
    import torch

    found = []
    for part in features_ND.split(rows):
        nearest = torch.empty(len(part), 0, device=part.device)
        for others in features_ND.split(rows):
            block = rounded_distances(part, others)
            nearest = torch.cat([nearest, _smallest(block, neighborhood + 1)], dim=1)
            nearest = _smallest(nearest, neighborhood + 1)
        found.append(nearest.amax(dim=1))
    return torch.cat(found)


def _smallest(rows_NM: Tensor, count: int) -> Tensor:
    """The `count` smallest numbers of each row, or all if there are fewer."""
    return rows_NM.topk(min(count, rows_NM.shape[1]), dim=1, largest=False).values
