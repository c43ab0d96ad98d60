"""Opening of images at an address: a data set by name, sample shards, a folder of pictures, an .npz batch.

An address opens as an `ImageSet`, whose images are read by index, so that any actor can read any block. The
address is:

    data, held-out       the training and the held-out images of the config's `data.name`
    FOLDER or s3://...   shards and their manifest, as `sample --shards` and `evaluation.keep_samples` write them
    FOLDER               pictures, in the order of their paths, as `picture_files.py` takes and reads them
    FILE.npz             `images` (N, C, H, W) as `sample --out` writes, or `arr_0` (N, H, W, C) as ADM's batches have
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsno_cluster.config import DataConfig
from dsno_cluster.config.paths import NAMED_IMAGES
from dsno_cluster.errors import UserError
from dsno_cluster.image_sets.image_set import DataIdentity, ImageSet, rows_of, shape_of
from dsno_cluster.image_sets.npz_file import npz_file
from dsno_cluster.image_sets.npz_images import npz_images
from dsno_cluster.image_sets.picture_images import picture_images
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import Storage, absolute_address, open_storage
from dsno_cluster.trajectories.shards import Manifest, read_manifest, read_shard


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
        return npz_images(npz_file(address))
    storage = open_storage(address, endpoint_url)
    found = read_manifest(storage, "")
    if found is not None:
        return _shards(address, storage, found[0])
    if "://" in address:
        raise UserError(
            f"{address}: no manifest.json here, so no sample shards; pictures are read only from a folder: copy them to one"
        )
    return picture_images(Path(address))


def _named(name: str, data: DataConfig) -> ImageSet:
    from dsno_cluster.data import load_data
    from dsno_cluster.images import to_uint8

    if data.name is None:
        raise UserError(f"{name}: the config names no real images (data.name)")
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
