"""Random numbers per sample: the noise and label of sample i depend only on (seed, i).

A counter-based generator (Philox) is keyed with (seed, i), so neither batch size, actor, rank nor restart can
change a number. The fourth counter word keeps the uses of one key apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GENERATOR = "numpy-philox4x64-normal-float32/1"  # part of a trajectory spec: another name means other bytes

_NOISE, _LABEL = 0, 1


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(
            key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64)
        )
    )


def sample_noise(seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of the given samples, (N, *shape) float32."""
    import torch

    noise = [_generator(seed, i, _NOISE).standard_normal(shape, np.float32) for i in indices]
    return torch.from_numpy(np.stack(noise)) if noise else torch.empty(0, *shape)


def sample_labels(seed: int, indices: Iterable[int], num_classes: int) -> Tensor:
    """Uniform class labels of the given samples, (N,) int64."""
    import torch

    return torch.tensor(
        [int(_generator(seed, i, _LABEL).integers(num_classes)) for i in indices], dtype=torch.int64
    )


def noise_checksum(seed: int, shape: tuple[int, ...]) -> str:
    """sha256 of sample 0's noise, by which a machine checks that it regenerates the noise of a data set."""
    first = _generator(seed, 0, _NOISE).standard_normal(shape, np.float32)
    return hashlib.sha256(first.tobytes()).hexdigest()
