"""The images of an .npz batch, memory-mapped if they are not compressed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.errors import UserError
from dsno_cluster.image_sets.image_set import DataIdentity, ImageSet, rows_of, shape_of
from dsno_cluster.image_sets.npz_file import IMAGES, array_names, find_images, read_arrays
from dsno_cluster.weight_files import file_sha256


def npz_images(file: Path) -> ImageSet:
    """The image set in an .npz. Raises UserError if it has none, or is damaged."""
    found = find_images(file)
    if found is None:
        names = ", ".join(array_names(file)) or "nothing"
        raise UserError(
            f"{file}: has none of {', '.join(IMAGES)}, the images of an .npz batch; it holds {names}"
        )
    name, images = found
    in_rows = name == "arr_0"

    def at(indices: Sequence[int]) -> Tensor:
        part = torch.from_numpy(np.array(images[np.asarray(indices)], order="C"))
        return part.permute(0, 3, 1, 2).contiguous() if in_rows else part

    def identify() -> DataIdentity:
        return DataIdentity(kind="npz", bytes=file.stat().st_size, sha256=file_sha256(file))

    classes = None if in_rows else _labels(file, len(images))
    labels_at = None if classes is None else rows_of(classes)
    return ImageSet(str(file), len(images), shape_of(at([0])[0]), identify, at, labels_at)


def _labels(file: Path, count: int) -> Tensor | None:
    """The classes (count,) beside the images of an .npz of ours, or None."""
    if "labels" not in array_names(file):
        return None
    (found,) = read_arrays(file, ["labels"])
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise UserError(
            f"{file}: labels is {found.dtype} of {found.shape}, of {count} images; they are whole numbers"
        )
    return torch.from_numpy(found.astype(np.int64))
