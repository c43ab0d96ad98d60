"""The images of an .npz batch, or states, memory-mapped if they are not compressed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.errors import UserError
from dsno_cluster.files import file_sha256
from dsno_cluster.image_sets.image_set import DataIdentity, ImageSet, Shape, rows_of, shape_of
from dsno_cluster.image_sets.npz_file import IMAGES, array_names, check_images, find_array, read_arrays

LABELS = ("labels", "arr_1")  # names of an array of classes: ours, and ADM's
PLACES = f"the arrays {' and '.join(LABELS)}"


def npz_images(file: Path, states: Shape | None = None, *, num_classes: int = 0) -> ImageSet:
    """The image set in an .npz.

    With the shape of `states`, an array (N, C, H, W) of floating-point numbers of that shape is taken as states. The
    classes of ADM's batches (`arr_1`) are read only if there are `num_classes`: they are those of a sampler.
    Raises UserError if there are no images, or the file is damaged.
    """
    found = find_array(file, IMAGES)
    if found is None:
        names = ", ".join(array_names(file)) or "nothing"
        raise UserError(
            f"{file}: has none of {', '.join(IMAGES)}, the images of an .npz batch; it holds {names}"
        )
    name, images = found
    if states is None or images.dtype.kind != "f":
        check_images(file, name, images)
    elif images.shape[1:] != states or not len(images):
        raise UserError(
            f"{file}: {name} is {images.dtype} of {images.shape}; states are (N, {', '.join(map(str, states))})"
        )
    in_rows = name == "arr_0" and images.dtype == np.uint8
    dtype = torch.uint8 if images.dtype == np.uint8 else torch.float32

    def at(indices: Sequence[int]) -> Tensor:
        rows = np.array(images[np.asarray(indices)], images.dtype.newbyteorder("="), order="C")
        part = torch.from_numpy(rows).to(dtype)
        return part.permute(0, 3, 1, 2).contiguous() if in_rows else part

    def identify() -> DataIdentity:
        return DataIdentity(kind="npz", bytes=file.stat().st_size, sha256=file_sha256(file))

    kept = LABELS if num_classes else LABELS[:1] if name == "images" else ()
    classes = _labels(file, len(images), kept)
    labels_at = None if classes is None else rows_of(classes)
    return ImageSet(
        str(file), len(images), shape_of(at([0])[0]), identify, at, labels_at, None, dtype, PLACES
    )


def _labels(file: Path, count: int, names: Sequence[str]) -> Tensor | None:
    """The classes (count,) beside the images of an .npz, by the first of these names that it has, or None."""
    there = array_names(file)
    name = next((name for name in names if name in there), None)
    if name is None:
        return None
    (found,) = read_arrays(file, [name])
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise UserError(
            f"{file}: {name} is {found.dtype} of {found.shape}, of {count} images; they are whole numbers"
        )
    return torch.from_numpy(found.astype(np.int64))
