"""Sets of images to be measured: a data set by name, sample shards, a folder of pictures, an .npz batch.

An address opens as an `ImageSet`, whose images are read by index, so that any actor can read any block. The
address is:

    data, held-out       the training and the held-out images of the config's `data.name`
    FOLDER or s3://...   shards and their manifest, as `sample --shards` and `evaluation.keep_samples` write them
    FOLDER               pictures, in the order of their paths, as `picture_files.py` takes and reads them
    FILE.npz             `images` (N, C, H, W) as `sample --out` writes, or `arr_0` (N, H, W, C) as ADM's batches have
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import DataConfig
from dsno_cluster.config.base import Named, later
from dsno_cluster.config.paths import NAMED_IMAGES
from dsno_cluster.errors import UserError
from dsno_cluster.files import not_there, shown_path
from dsno_cluster.image_sets.npz_file import IMAGES, array_names, find_images, npz_file, read_arrays
from dsno_cluster.image_sets.picture_files import PICTURES, READING, find_pictures, read_picture
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import Storage, absolute_address, open_storage
from dsno_cluster.trajectories.shards import Manifest, read_manifest, read_shard
from dsno_cluster.weight_files import file_sha256

READERS = 4  # pictures decoded at a time


class DataIdentity(Named):
    """The identity of images, or of their statistics.

    It is a hash of their content; for pictures, of their files' names, sizes and times, and `reading` is the
    version of how their pixels are read.
    """

    kind: str
    sha256: str | None = later(None)
    bytes: int | None = later(None)
    files: str | None = later(None)
    reading: int | None = later(None)


@dataclass(frozen=True)
class ImageSet:
    """`count` images uint8 (C, H, W) of one shape: `read` gives (N, C, H, W), `labels` their classes (N,) int64.

    `labels` is None if the classes are not known. `note`: which files of a folder were left out, if any were.
    """

    address: str
    count: int
    shape: tuple[int, int, int]
    identify: Callable[[], DataIdentity]
    read: Callable[[int, int], Tensor]
    labels: Callable[[int, int], Tensor] | None = None
    note: str | None = None

    def say_note(self) -> None:
        """Say which files were left out, if any were."""
        if self.note is not None:
            console.say(f"note: {shown_path(self.address)}: {self.note}")

    @functools.cached_property
    def identity(self) -> DataIdentity:
        """Their identity, computed only when asked for: a whole file may have to be read."""
        return self.identify()


def open_images(
    address: str,
    endpoint_url: str | None = None,
    data: DataConfig = DataConfig(),  # noqa: B008 (frozen)
) -> ImageSet:
    """The image set at an address, or that of `data` by its name. Raises UserError, naming the address, if there is none."""
    if address in NAMED_IMAGES:
        return _named(address, data)
    address = absolute_address(address)  # valid in any process
    if address.endswith(".npz"):
        return _npz(npz_file(address))
    storage = open_storage(address, endpoint_url)
    found = read_manifest(storage, "")
    if found is not None:
        return _shards(address, storage, found[0])
    if "://" in address:
        raise UserError(
            f"{address}: no manifest.json here, so no sample shards; pictures are read only from a folder: copy them to one"
        )
    return _pictures(Path(address))


def _named(name: str, data: DataConfig) -> ImageSet:
    from dsno_cluster.data import load_data
    from dsno_cluster.images import to_uint8

    if data.name is None:
        raise UserError(f"{name}: the config names no real images (data.name)")
    split = load_data(data.name, data.path)[NAMED_IMAGES.index(name)]
    images = to_uint8(split.images)

    def identify() -> DataIdentity:
        return DataIdentity(kind=name, sha256=hashlib.sha256(images.numpy().tobytes()).hexdigest())

    return ImageSet(name, len(images), _shape(images[0]), identify, _parts(images), _parts(split.labels))


def _shards(address: str, storage: Storage, manifest: Manifest) -> ImageSet:
    shards = manifest.shards

    def identify() -> DataIdentity:
        return DataIdentity(kind="shards", sha256=canonical_hash({"shards": [s.sha256 for s in shards]}))

    @functools.lru_cache(2)  # a block may begin in one shard and end in the next
    def tensors_of(index: int) -> dict[str, Tensor]:
        tensors = read_shard(storage, "", shards[index])
        if "images" not in tensors:
            raise UserError(f"{address}: its shards hold {', '.join(tensors)}, not images")
        return tensors

    def part(name: str, start: int, stop: int) -> Tensor:
        touched = [i for i, s in enumerate(shards) if s.start < stop and s.stop > start]
        parts = [
            tensors_of(i)[name][max(start - shards[i].start, 0) : stop - shards[i].start]
            for i in touched
        ]  # fmt: skip
        return torch.cat(parts)

    if not shards:
        raise UserError(f"{address}: its manifest names no shard")
    read, first = functools.partial(part, "images"), tensors_of(0)
    labels = functools.partial(part, "labels") if "labels" in first else None
    return ImageSet(address, manifest.num_samples, _shape(first["images"][0]), identify, read, labels)


def _npz(file: Path) -> ImageSet:
    found = find_images(file)
    if found is None:
        names = ", ".join(array_names(file)) or "nothing"
        raise UserError(
            f"{file}: has none of {', '.join(IMAGES)}, the images of an .npz batch; it holds {names}"
        )
    name, images = found
    in_rows = name == "arr_0"

    def read(start: int, stop: int) -> Tensor:
        part = torch.from_numpy(np.array(images[start:stop], order="C"))
        return part.permute(0, 3, 1, 2).contiguous() if in_rows else part

    def identify() -> DataIdentity:
        return DataIdentity(kind="npz", bytes=file.stat().st_size, sha256=file_sha256(file))

    classes = None if in_rows else _npz_labels(file, len(images))
    labels = None if classes is None else _parts(classes)
    return ImageSet(str(file), len(images), _shape(read(0, 1)[0]), identify, read, labels)


def _parts(rows: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: rows[start:stop]


def _npz_labels(file: Path, count: int) -> Tensor | None:
    """The classes (count,) beside the images of an .npz of ours, or None."""
    if "labels" not in array_names(file):
        return None
    (found,) = read_arrays(file, ["labels"])
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise UserError(
            f"{file}: labels is {found.dtype} of {found.shape}, of {count} images; they are whole numbers"
        )
    return torch.from_numpy(found.astype(np.int64))


def _pictures(folder: Path) -> ImageSet:
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
    shape = _shape(_picture(files[0]))

    def one(file: Path) -> Tensor:
        image = _picture(file)
        if _shape(image) != shape:
            raise UserError(
                f"{file}: is {tuple(image.shape)}, {files[0].name} is {shape}; bring them to one size first"
            )
        return image

    def read(start: int, stop: int) -> Tensor:
        with ThreadPoolExecutor(READERS) as threads:
            return torch.stack(list(threads.map(one, files[start:stop])))

    def identify() -> DataIdentity:
        root = folder.resolve()
        lines = [
            [str(f.relative_to(root)) if f.is_relative_to(root) else str(f), s.st_size, s.st_mtime_ns]
            for f, s in ((f, f.stat()) for f in files)
        ]
        names = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
        return DataIdentity(kind="pictures", files=names, reading=READING)

    return ImageSet(str(folder), len(files), shape, identify, read, note=found.note)


def _picture(file: Path) -> Tensor:
    """A picture as uint8 (3, H, W)."""
    return torch.from_numpy(read_picture(file)).permute(2, 0, 1)


def _shape(image: Tensor) -> tuple[int, int, int]:
    channels, height, width = image.shape
    return int(channels), int(height), int(width)
