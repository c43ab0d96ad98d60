"""Real images: scikit-learn's handwritten digits, 1797 images of 8x8 in 10 classes, with a fixed split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAIN_COUNT = 1500


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 8, 8) float32 in [-1, 1] and their classes (N,) int64."""

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Split, Split]:
    """1500 training and 297 held-out digits, split by `numpy.random.RandomState(0).permutation(1797)`."""
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    images = torch.from_numpy((raw.images / 8.0 - 1.0).astype(np.float32))[:, None]
    labels = torch.from_numpy(raw.target.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    train, held_out = order[:TRAIN_COUNT], order[TRAIN_COUNT:]
    return Split(images[train], labels[train]), Split(images[held_out], labels[held_out])
