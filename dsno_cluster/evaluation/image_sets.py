"""Sets of images to be measured: a data set by name, sample shards, a folder of pictures, an .npz batch.

An address opens as an `ImageSet`, whose images are read by index, so that any actor can read any block. The
address is:

    data, held-out       the training and the held-out images of the config's `data.name`
    FOLDER or s3://...   shards and their manifest, as `sample --shards` and `evaluation.keep_samples` write them
    FOLDER               pictures (.png, .jpg, .jpeg), in the order of their paths, as torch-fidelity reads them
    FILE.npz             `images` (N, C, H, W) as `sample --out` writes, or `arr_0` (N, H, W, C) as ADM's batches have
"""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.config.base import Named, later
from dsno_cluster.config.paths import NAMED_IMAGES
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.features import file_sha256
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import Storage, absolute_address, open_storage
from dsno_cluster.trajectories.shards import Manifest, read_manifest, read_shard

ARRAYS = ("images", "arr_0")  # of an .npz: ours, and ADM's
READERS = 4  # pictures decoded at a time


class DataIdentity(Named):
    """The identity of images, or of their statistics.

    It is a hash of their content; for pictures, of their files' names, sizes and times.
    """

    kind: str
    sha256: str | None = later(None)
    bytes: int | None = later(None)
    files: str | None = later(None)


@dataclass(frozen=True)
class ImageSet:
    """`count` images uint8 (C, H, W) of one shape: `read` gives (N, C, H, W), `labels` their classes (N,) int64.

    `labels` is None if the classes are not known.
    """

    address: str
    count: int
    shape: tuple[int, int, int]
    identify: Callable[[], DataIdentity]
    read: Callable[[int, int], Tensor]
    labels: Callable[[int, int], Tensor] | None = None

    @functools.cached_property
    def identity(self) -> DataIdentity:
        """Their identity, computed only when asked for: a whole file may have to be read."""
        return self.identify()


def open_images(address: str, endpoint_url: str | None = None) -> ImageSet:
    """The image set at an address. Raises UserError, naming the address, if there is none."""
    if address in NAMED_IMAGES:
        return _named(address)
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


def _named(name: str) -> ImageSet:
    from dsno_cluster.data import load_digits
    from dsno_cluster.images import to_uint8

    split = load_digits()[NAMED_IMAGES.index(name)]
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
    name, images = npz_images(file) or (None, None)
    if name is None or images is None:
        raise UserError(f"{file}: holds none of {', '.join(ARRAYS)}, the images of an .npz batch")
    in_rows = name == "arr_0"

    def read(start: int, stop: int) -> Tensor:
        part = torch.from_numpy(np.array(images[start:stop]))
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
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if "labels" not in arrays.files:
                return None
            found = arrays["labels"]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file}: labels cannot be read: {error}") from None
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise UserError(
            f"{file}: labels is {found.dtype} of {found.shape}, of {count} images; they are whole numbers"
        )
    return torch.from_numpy(found.astype(np.int64))


def npz_file(address: str) -> Path:
    """The file at an .npz's address.

    Raises UserError for an s3:// address, from which only shards are read.
    """
    if "://" in address:
        raise UserError(f"{address}: an .npz is read only from a folder; copy it to one")
    return Path(address)


def npz_images(file: Path) -> tuple[str, np.ndarray] | None:
    """Name and array of an .npz batch's images, memory-mapped if uncompressed; None if it has none.

    Raises UserError if the file is not an .npz or its images are not uint8 of four axes.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing")
    try:
        with zipfile.ZipFile(file) as archive:
            names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            name = next((name for name in ARRAYS if name in names), None)
            if name is None:
                return None
            info = names[name]
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = header(member)
                before = member.tell()
        if dtype != np.uint8 or len(shape) != 4 or fortran or not shape[0]:
            raise UserError(f"{file}: {name} is {dtype} of {shape}; images are uint8 of four axes")
        if info.compress_type != zipfile.ZIP_STORED:
            with np.load(file, allow_pickle=False) as arrays:
                return name, arrays[name]
        with file.open("rb") as raw:  # the lengths in the local header give the offset of the member's bytes
            raw.seek(info.header_offset)
            local = raw.read(30)
        skip = 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        return name, np.memmap(file, np.uint8, "r", info.header_offset + skip + before, shape)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file}: not an .npz file: {error}") from None


def _pictures(folder: Path) -> ImageSet:
    from torch_fidelity.utils import glob_samples_paths

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, and no .npz file")
    files = [Path(p) for p in glob_samples_paths(str(folder), True, "png,jpg,jpeg", verbose=False)]
    if not files:
        raise UserError(f"{folder}: neither sample shards (manifest.json) nor pictures (.png, .jpg) are here")
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
        return DataIdentity(kind="pictures", files=hashlib.sha256(json.dumps(lines).encode()).hexdigest())

    return ImageSet(str(folder), len(files), shape, identify, read)


def _picture(file: Path) -> Tensor:
    """A picture as uint8 (3, H, W), as torch-fidelity reads it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{file}: is not a picture that can be read: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _shape(image: Tensor) -> tuple[int, int, int]:
    channels, height, width = image.shape
    return int(channels), int(height), int(width)
