"""Opening of images at an address: a data set by name, sample shards, pictures, an .npz batch, WebDataset tars.

An address opens as an `ImageSet`, whose images are read by index, so that any actor can read any block. The
address, a path or s3://..., is:

    data, held-out   the training and the held-out images of the config's `data.name` or `data.images`
    FOLDER           shards and their manifest, as `sample --shards` and `evaluation.keep_samples` write them
    FOLDER           pictures, in the order of their paths, as `picture_files.py` takes and reads them
    FOLDER           of .tar files, in the order of their names, if it holds no pictures
    NAME.tar         WebDataset tars, several by a pattern: shard-{000..146}.tar or shard-*.tar
    FILE.npz         `images` (N, C, H, W) as `sample --out` writes, or `arr_0` (N, H, W, C) as ADM's batches have
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.config import DataConfig
from dsno_cluster.config.paths import NAMED_IMAGES
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import cache_folder, not_there, written_aside
from dsno_cluster.image_sets.image_set import DataIdentity, ImageSet, Shape, among, rows_of, shape_of
from dsno_cluster.image_sets.npz_images import npz_images
from dsno_cluster.image_sets.picture_files import PICTURES, find_pictures
from dsno_cluster.image_sets.picture_images import folder_pictures, stored_pictures
from dsno_cluster.image_sets.tar_images import is_name_of_tars, tar_images, tars_at, tars_in
from dsno_cluster.images import to_uint8
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import Storage, absolute_address, open_storage, split_path
from dsno_cluster.trajectories.shards import Manifest, read_manifest, read_shard

MOST_HELD_OUT = 5000
DOWNLOADED = 2**26  # bytes at a time


def open_images(
    address: str,
    endpoint_url: str | None = None,
    data: DataConfig = DataConfig(),  # noqa: B008 (frozen)
    *,
    states: Shape | None = None,
    num_classes: int = 0,
) -> ImageSet:
    """The image set at an address, or that of `data` by its name.

    With the shape of `states`, floating-point arrays of that shape count too, as states. With `num_classes`, the classes
    of pictures and tars are looked for. Raises UserError, naming the address, if there are no images.
    """
    if address in NAMED_IMAGES:
        return _named(address, data, endpoint_url)
    address = absolute_address(address)  # valid in any process
    if address.endswith(".npz"):
        images = npz_images(local_copy(address, endpoint_url), states, num_classes=num_classes)
        return replace(images, address=address)
    if is_name_of_tars(address):
        storage, keys = tars_at(address, endpoint_url)
        return tar_images(storage, keys, address, states, num_classes=num_classes)
    storage = open_storage(address, endpoint_url)
    found = read_manifest(storage, "")
    if found is not None:
        return _shards(address, storage, found[0])
    if "://" not in address and not Path(address).is_dir():
        what = (
            "is a file, and neither .npz, .tar nor a folder" if Path(address).exists() else not_there(address)
        )
        raise UserError(f"{address}: {what}")
    note = None
    if "://" in address:
        pictures = stored_pictures(storage, num_classes=num_classes)
    else:
        there = find_pictures(Path(address))
        pictures = folder_pictures(Path(address), there, num_classes=num_classes) if there.files else None
        note = there.note
    if pictures is not None:
        return pictures
    if keys := tars_in(storage):
        return tar_images(storage, keys, address, states, num_classes=num_classes)
    raise UserError(
        f"{address}: neither sample shards (manifest.json) nor .tar files nor pictures ({', '.join(PICTURES)}) are here"
        f"{f'; {note}' if note else ''}"
    )


def local_copy(address: str, endpoint_url: str | None) -> Path:
    """The file at an address; one of S3 is downloaded to the user's cache first, once. Raises UserError if it is missing."""
    if "://" not in address:
        return Path(address)
    parent, name = split_path(address)
    storage = open_storage(parent, endpoint_url)
    found = storage.stat(name)
    if found is None:
        raise UserError(f"{address}: no such file")
    of = canonical_hash({"address": address, "endpoint": endpoint_url, "etag": found.etag})
    file = cache_folder("images") / f"{of}-{name}"
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(file) as aside, aside.open("wb") as opened:
                for start in range(0, found.size, DOWNLOADED):
                    opened.write(storage.read(name, start, min(start + DOWNLOADED, found.size)))
                opened.flush()
                aside.rename(file)
        except OSError as error:
            raise WorkError(f"{address}: cannot be downloaded to {file}: {error.strerror}") from error
    return file


def held_out_split(count: int) -> tuple[Tensor, Tensor]:
    """The indices of training and of held-out images of one's own, each in ascending order.

    Held out are the last tenth, 5000 at the most, of a permutation that depends only on the count.
    """
    order = torch.from_numpy(np.random.RandomState(0).permutation(count))
    kept = count - min(count // 10, MOST_HELD_OUT)
    return order[:kept].sort().values, order[kept:].sort().values


def part_of(images: ImageSet, chosen: Tensor, name: str) -> ImageSet:
    """The images of the `chosen` indices as a set of that `name`."""
    return replace(
        images,
        address=name,
        count=len(chosen),
        at=among(images.at, chosen),
        labels_at=None if images.labels_at is None else among(images.labels_at, chosen),
        identify=lambda: images.identity.model_copy(update={"kind": f"{name} of {images.identity.kind}"}),
    )


def _named(name: str, data: DataConfig, endpoint_url: str | None) -> ImageSet:
    if data.images is not None:
        own = open_images(data.images, endpoint_url)
        return part_of(own, held_out_split(own.count)[NAMED_IMAGES.index(name)], name)
    from dsno_cluster.data import load_data

    if data.name is None:
        raise UserError(f"{name}: the config names no real images (data.name, data.images)")
    split = load_data(data.name, data.path)[NAMED_IMAGES.index(name)]
    images = to_uint8(split.images)

    def identify() -> DataIdentity:
        return DataIdentity(kind=name, sha256=hashlib.sha256(images.numpy().tobytes()).hexdigest())

    return ImageSet(name, len(images), shape_of(images[0]), identify, rows_of(images), rows_of(split.labels))


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

    starts = [shard.start for shard in shards]

    def rows(name: str, indices: Sequence[int]) -> Tensor:
        places = [(bisect.bisect_right(starts, i) - 1, i) for i in indices]
        return torch.stack([tensors_of(shard)[name][i - starts[shard]] for shard, i in places])

    if not shards:
        raise UserError(f"{address}: its manifest names no shard")
    at, first = functools.partial(rows, "images"), tensors_of(0)
    labels_at = functools.partial(rows, "labels") if "labels" in first else None
    return ImageSet(address, manifest.num_samples, shape_of(first["images"][0]), identify, at, labels_at)
