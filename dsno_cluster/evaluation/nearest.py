"""How near images are to the training images: shows samples that are learnt by heart.

Distances are those of features, Euclidean, as for precision and recall (Kynkaanniemi et al. 2019, section 2). What is too near is
judged by real images that were held out, as Meehan et al. do (2020, "A non-parametric test to detect data-copying in generative
models"): a sampler that copies is nearer to the training images than new real images are.
"""

from __future__ import annotations

import numpy as np
import torch

from dsno_cluster import console
from dsno_cluster.device import compute_device
from dsno_cluster.features.neighbours import nearest

LOW = 0.05  # the quantile of `nearest_low`: a few copies among many samples do not show in a median
COPY = 0.01  # the share of held-out real images that count as copies


def nearest_training(samples_ND: np.ndarray, training_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distance of each sample's features to the nearest training image's, float64 (N,), and that image's index, (N,).

    On a GPU, if this process sees one and it has room.
    """
    # what an actor sends cannot be written to, of which torch would warn
    samples, training = (torch.from_numpy(np.require(x, requirements="W")) for x in (samples_ND, training_MD))
    device = compute_device()
    try:
        distances_N, index_N = nearest(samples.to(device), training.to(device))
    except torch.OutOfMemoryError:  # the actors hold it
        console.say("note: the GPU has no room for the nearest training images: they are found on the CPU")
        distances_N, index_N = nearest(samples, training)
    return distances_N.cpu().numpy(), index_N.cpu().numpy()


def copy_distance(held_out_N: np.ndarray) -> float:
    """The distance below which an image is a copy: the 1 % quantile of the distances of held-out real images."""
    return float(np.quantile(held_out_N, COPY))


def nearest_figures(distances_N: np.ndarray, copies_below: float | None) -> dict[str, float]:
    """`nearest`, the median distance, `nearest_low`, the 5 % quantile, and `copies`, the share below a known distance."""
    found = {"nearest": float(np.median(distances_N)), "nearest_low": float(np.quantile(distances_N, LOW))}
    if copies_below is not None:
        found["copies"] = float((distances_N < copies_below).mean())
    return found
