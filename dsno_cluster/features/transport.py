"""Optimal transport between Gaussians, and their Frechet distance: pure functions of float64 moments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.features.statistics import Gaussian

SMALLEST = 1e-10  # eigenvalues below this share of the largest count as 0


def as_tensors(gaussian: Gaussian[np.ndarray]) -> Gaussian[Tensor]:
    """The same Gaussian in tensors on the CPU, which share its memory."""
    return Gaussian(torch.from_numpy(gaussian.mean), torch.from_numpy(gaussian.covariance))


def gaussian_of(features_ND: Tensor) -> Gaussian[Tensor]:
    """The moments of features (N, D), the covariance with ddof 0."""
    features = features_ND.double()
    mean = features.mean(dim=0)
    centred = features - mean
    return Gaussian(mean, centred.T @ centred / len(features))


def mixed(before: Gaussian[Tensor], new: Gaussian[Tensor], share: Tensor | float) -> Gaussian[Tensor]:
    """The moments of a mixture of two populations, of which the new one has so large a share, in 0..1."""
    apart = new.mean - before.mean
    between = share * (1.0 - share) * torch.outer(apart, apart)
    mean = before.mean + share * apart
    return Gaussian(mean, (1.0 - share) * before.covariance + share * new.covariance + between)


def root_of(covariance_DD: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance_DD)
    root: Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    return root


@dataclass(frozen=True)
class Transport:
    """The optimal transport from one Gaussian to another: y = mean_to + (x - mean_from) map.

    `distance` is the squared cost of it, a scalar: their Frechet distance.
    """

    mean_from: Tensor
    mean_to: Tensor
    map: Tensor
    distance: Tensor

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Where features (N, D) are carried to, (N, D) float64."""
        return self.mean_to + (features_ND.double() - self.mean_from) @ self.map


def transport(start: Gaussian[Tensor], end: Gaussian[Tensor], root: Tensor) -> Transport:
    """The optimal transport between two Gaussians; `root` is the square root of the end's covariance, R.

    map = R (R S R)^-1/2 R for the start's covariance S, and distance = |mean_to - mean_from|^2 + tr(S + R^2 - 2 (R S R)^1/2)
    (Dowson & Landau 1982; Peyre & Cuturi 2019, *Computational Optimal Transport*, equations 2.40 and 2.41). In directions in
    which one of them has no variance, everything is carried to the mean.
    """
    product = root @ start.covariance @ root
    # what is not finite shows in the traces, which the loop judges; `eigh` would raise
    values, vectors = torch.linalg.eigh(torch.nan_to_num((product + product.T) / 2, 0.0, 0.0, 0.0))
    roots = values.clamp(min=0.0).sqrt()
    inverse = torch.where(values > SMALLEST * values[-1], roots.reciprocal(), 0.0)
    apart = end.mean - start.mean
    traces = start.covariance.trace() + end.covariance.trace() - 2.0 * roots.sum()
    return Transport(
        start.mean, end.mean, root @ ((vectors * inverse) @ vectors.T) @ root, apart.dot(apart) + traces
    )
