"""The pictures of a folder as a set of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from dsno_cluster.errors import UserError
from dsno_cluster.files import not_there
from dsno_cluster.image_sets.image_set import DataIdentity, ImageSet, shape_of
from dsno_cluster.image_sets.picture_files import PICTURES, READING, find_pictures, read_picture

READERS = 4  # pictures decoded at a time


def picture_images(folder: Path) -> ImageSet:
    """The image set of a folder's pictures, which are of one size. Raises UserError if there are none."""
    if not folder.is_dir():
        what = "is a file, and neither an .npz nor a folder" if folder.exists() else not_there(folder)
        raise UserError(f"{folder}: {what}")
    found = find_pictures(folder)
    files = found.files
    if not files:
        here = f"; {found.note}" if found.note else ""
        raise UserError(
            f"{folder}: neither sample shards (manifest.json) nor pictures ({', '.join(PICTURES)}) are here{here}"
        )
    shape = shape_of(_picture(files[0]))

    def one(file: Path) -> Tensor:
        image = _picture(file)
        if shape_of(image) != shape:
            raise UserError(
                f"{file}: is {tuple(image.shape)}, {files[0].name} is {shape}; bring them to one size first"
            )
        return image

    def at(indices: Sequence[int]) -> Tensor:
        with ThreadPoolExecutor(READERS) as threads:
            return torch.stack(list(threads.map(one, [files[i] for i in indices])))

    def identify() -> DataIdentity:
        root = folder.resolve()
        lines = [
            [str(f.relative_to(root)) if f.is_relative_to(root) else str(f), s.st_size, s.st_mtime_ns]
            for f, s in ((f, f.stat()) for f in files)
        ]
        names = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
        return DataIdentity(kind="pictures", files=names, reading=READING)

    return ImageSet(str(folder), len(files), shape, identify, at, note=found.note)


def _picture(file: Path) -> Tensor:
    """A picture as uint8 (3, H, W)."""
    return torch.from_numpy(read_picture(file)).permute(2, 0, 1)
