"""Real images: handwritten digits of scikit-learn (8x8) and of MNIST (28x28, padded to 32x32), each with a fixed split."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsno_cluster.errors import UserError, said_by
from dsno_cluster.files import cache_folder

DIGITS_FOR_TRAINING = 1500
# the arrays of an .npz with MNIST, as Keras names them, and shorter
NPZ_NAMES = (("x_train", "y_train", "x_test", "y_test"), ("x", "y", "xt", "yt"))


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) float32 in [-1, 1] and their classes (N,) int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DataSet:
    """Images of `shape` (C, H, W) in `num_classes` classes; `load`, given a path or None, gives training and held-out ones."""

    shape: tuple[int, int, int]
    num_classes: int
    load: Callable[[str | None], tuple[Split, Split]]


@functools.lru_cache(maxsize=1)
def load_data(name: str, path: str | None = None) -> tuple[Split, Split]:
    """The training and the held-out images of a data set of DATA_SETS.

    `path` is where they are, for a data set that is made of files; None: they are downloaded once. Raises
    UserError if they are not there.
    """
    return DATA_SETS[name].load(path)


def _digits(path: str | None) -> tuple[Split, Split]:
    """1500 training and 297 held-out digits, split by `numpy.random.RandomState(0).permutation(1797)`."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy((raw.images / 8.0 - 1.0).astype(np.float32))[:, None]
    labels = torch.from_numpy(raw.target.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    train, held_out = order[:DIGITS_FOR_TRAINING], order[DIGITS_FOR_TRAINING:]
    return Split(images[train], labels[train]), Split(images[held_out], labels[held_out])


def _mnist(path: str | None) -> tuple[Split, Split]:
    """MNIST's 60 000 training and 10 000 test images, with a border of two black pixels."""
    if path is not None and path.endswith(".npz"):
        return _mnist_of_npz(Path(path))
    return _mnist_of_torchvision(path)


def _mnist_of_torchvision(path: str | None) -> tuple[Split, Split]:
    from torchvision.datasets import MNIST

    root = Path(path) if path is not None else cache_folder("data")
    try:
        parts = [MNIST(str(root), train=train, download=path is None) for train in (True, False)]
    except (
        RuntimeError,
        OSError,
    ) as error:  # torchvision raises plain RuntimeError if files are missing or damaged
        files = "the files of torchvision's MNIST below MNIST/raw/, or name an .npz with x_train, y_train, x_test, y_test"
        if path is None:
            raise UserError(
                f"data.name mnist: cannot be downloaded to {root} ({said_by('torchvision', error)}); from a machine that can, "
                f"put in a folder {files}, and name it in data.path"
            ) from None
        raise UserError(
            f"data.path: {path} does not hold {files} ({said_by('torchvision', error)})"
        ) from None
    return _padded(parts[0].data, parts[0].targets), _padded(parts[1].data, parts[1].targets)


def _mnist_of_npz(file: Path) -> tuple[Split, Split]:
    try:
        with np.load(file, allow_pickle=False) as content:
            found = set(content.files)
            names = next((names for names in NPZ_NAMES if found >= set(names)), None)
            arrays = [torch.from_numpy(content[name]) for name in names] if names else []
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: {file} cannot be read: {said_by('numpy', error)}") from None
    if not arrays:
        raise UserError(
            f"data.path: {file} holds {', '.join(sorted(found))}, not {', '.join(NPZ_NAMES[0])} as Keras's mnist.npz does"
        )
    for images, labels in (arrays[:2], arrays[2:]):
        if images.dtype != torch.uint8 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise UserError(
                f"data.path: {file} holds images {tuple(images.shape)} {images.dtype} and labels {tuple(labels.shape)}; MNIST's "
                "are (N, 28, 28) torch.uint8 and (N,)"
            )
    return _padded(*arrays[:2]), _padded(*arrays[2:])


def _padded(images_NHW: Tensor, labels_N: Tensor) -> Split:
    return Split(F.pad(images_NHW[:, None], (2, 2, 2, 2)).float() / 127.5 - 1.0, labels_N.long())


DATA_SETS = {
    "digits": DataSet((1, 8, 8), 10, _digits),
    "mnist": DataSet((1, 32, 32), 10, _mnist),
}
