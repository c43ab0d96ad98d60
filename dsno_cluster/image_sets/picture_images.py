"""The pictures of a folder, or below an S3 prefix, as a set of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.errors import UserError
from dsno_cluster.image_sets.image_set import DataIdentity, ImageSet, rows_of, shape_of
from dsno_cluster.image_sets.picture_files import (
    PICTURES,
    READING,
    FoundPictures,
    decode_picture,
    read_picture,
    refuse_bombs,
)
from dsno_cluster.image_sets.picture_labels import PLACES, picture_labels
from dsno_cluster.storage import FolderStorage, Storage

READERS = 4  # pictures decoded at a time


def folder_pictures(folder: Path, found: FoundPictures, *, num_classes: int) -> ImageSet:
    """The image set of the pictures that were `found` in a folder; with their classes if there are `num_classes`."""
    files = found.files

    def identify() -> DataIdentity:
        root = folder.resolve()
        lines: list[list[str | int]] = [
            [str(f.relative_to(root)) if f.is_relative_to(root) else str(f), s.st_size, s.st_mtime_ns]
            for f, s in ((f, f.stat()) for f in files)
        ]
        return _identity(lines)

    labels = picture_labels(found.names, FolderStorage(folder), num_classes) if num_classes else None
    read, at = pictures_at(lambda i: str(files[i]), lambda i: read_picture(files[i]))
    labels_at = None if labels is None else rows_of(labels)
    return ImageSet(
        str(folder), len(files), shape_of(read(0)), identify, at, labels_at, found.note, classes_in=PLACES
    )


def stored_pictures(storage: Storage, *, num_classes: int) -> ImageSet | None:
    """The same for a storage of objects; None if it has no pictures. Hidden ones, and files of other kinds, are left out."""
    stats = [s for s in storage.list("") if s.key.lower().endswith(PICTURES) and not _hidden(s.key)]
    if not stats:
        return None
    refuse_bombs()
    names = [stat.key for stat in stats]

    def identify() -> DataIdentity:
        return _identity([[stat.key, stat.size, stat.etag] for stat in stats])

    labels = picture_labels(names, storage, num_classes) if num_classes else None

    def where(index: int) -> str:
        return f"{storage.url}/{names[index]}"

    read, at = pictures_at(where, lambda i: decode_picture(storage.read(names[i]), where(i)))
    labels_at = None if labels is None else rows_of(labels)
    return ImageSet(storage.url, len(names), shape_of(read(0)), identify, at, labels_at, classes_in=PLACES)


def pictures_at(
    where: Callable[[int], str], pixels: Callable[[int], np.ndarray]
) -> tuple[Callable[[int], Tensor], Callable[[Sequence[int]], Tensor]]:
    """Readers of one picture (3, H, W) and of some (N, 3, H, W), by the `pixels` (H, W, 3) of each.

    They raise UserError, naming the picture by `where`, if its size is not that of the first.
    """

    def read(index: int) -> Tensor:
        return torch.from_numpy(pixels(index)).permute(2, 0, 1)

    shape = shape_of(read(0))

    def checked(index: int) -> Tensor:
        image = read(index)
        if shape_of(image) != shape:
            raise UserError(
                f"{where(index)}: is {tuple(image.shape)}, {Path(where(0)).name} is {shape}; bring them to one size first"
            )
        return image

    return read, lambda indices: in_threads(checked, indices)


def in_threads(read: Callable[[int], Tensor], indices: Sequence[int]) -> Tensor:
    """The rows of some indices, READERS at a time."""
    with ThreadPoolExecutor(READERS) as threads:
        return torch.stack(list(threads.map(read, indices)))


def _identity(lines: Sequence[Sequence[str | int]]) -> DataIdentity:
    names = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    return DataIdentity(kind="pictures", files=names, reading=READING)


def _hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))
