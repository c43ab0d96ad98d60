"""Reading shards for training: shuffled, every sample once an epoch, the same order for any world size.

The order of an epoch is a function of (seed, epoch): shards are permuted, and samples within windows of a few
shards, so that few shards are in memory at a time. Global batch b is the same samples on 1 rank or on 8.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.diffusion.noise import noise_checksum, sample_noise
from dsno_cluster.errors import UserError
from dsno_cluster.storage import Storage
from dsno_cluster.trajectories.shards import Manifest, Shard, read_manifest, read_shard

WINDOW_SHARDS = 8


@dataclass(frozen=True)
class Batch:
    """Of each sample: its index (N,), starting noise (N, C, H, W), states (N, M, C, H, W) float32, label (N,)."""

    indices: np.ndarray
    noise: Tensor
    states: Tensor
    labels: Tensor | None


def open_trajectories(storage: Storage, folder: str, num_samples: int) -> Manifest:
    """The manifest of a finished data set with at least `num_samples`, cut to those.

    Raises UserError where it is missing or too small, and where this machine cannot regenerate its noise.
    """
    found = read_manifest(storage, folder)
    if found is None:
        raise UserError(
            f"{storage.url}/{folder}: no finished trajectories of this config; run `dsno-cluster gen-trajectories` with it first"
        )
    manifest = found[0]
    if manifest.num_samples < num_samples:
        raise UserError(
            f"{storage.url}/{folder}: has {manifest.num_samples} trajectories, trajectories.num_samples is {num_samples}; "
            "run `dsno-cluster gen-trajectories` to add the others"
        )
    spec = manifest.spec
    if noise_checksum(spec["seed"], tuple(spec["shape"])) != spec["noise"]["first_sample_sha256"]:
        raise UserError(
            f"{storage.url}/{folder}: this machine's numpy gives other noise for the same seed ({spec['noise']['generator']}); "
            "use the numpy version of the manifest's environment"
        )
    shards = tuple(shard for shard in manifest.shards if shard.start < num_samples)
    return Manifest(spec, shards, manifest.environment)


def epoch_order(manifest: Manifest, seed: int, epoch: int, window: int = WINDOW_SHARDS) -> np.ndarray:
    """The samples of an epoch in reading order, (num_samples,) int64: each exactly once."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    shards = [manifest.shards[i] for i in random.permutation(len(manifest.shards))]
    windows = [shards[i : i + window] for i in range(0, len(shards), window)]
    return np.concatenate([
        random.permutation(np.concatenate([np.arange(s.start, s.stop) for s in part])) for part in windows
    ])  # fmt: skip


def read_batches(
    storage: Storage,
    folder: str,
    manifest: Manifest,
    *,
    seed: int,
    first_batch: int,
    batch_size: int,
    rank: int,
    world_size: int,
    accumulation: int = 1,
) -> Iterator[list[Batch]]:
    """This rank's part of global batch `first_batch`, and of every one after it, without end.

    A list has `accumulation` micro-batches. Global batches are runs of `batch_size` samples along the epochs'
    orders, one epoch after the other, so (batch, batch_size) says where a run is, whatever its world size. The
    next batch is read while the present one is used.
    """
    micro = batch_size // (world_size * accumulation)
    shards = _ShardCache(storage, folder, manifest)

    @functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
    def order(epoch: int) -> np.ndarray:
        return epoch_order(manifest, seed, epoch)

    def load(number: int) -> list[Batch]:
        epochs, within = np.divmod(np.arange(batch_size) + number * batch_size, manifest.num_samples)
        flat = np.array([order(int(e))[i] for e, i in zip(epochs, within, strict=True)])
        indices = flat.reshape(accumulation, world_size, micro)[:, rank]
        return [shards.batch(part) for part in indices]

    with ThreadPoolExecutor(1) as ahead:
        number = first_batch
        pending = ahead.submit(load, number)
        while True:
            ready = pending.result()
            number += 1
            pending = ahead.submit(load, number)
            yield ready


class _ShardCache:
    """The shards of the present window and of the one before it, decoded and checked, in memory."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self.storage, self.folder, self.manifest = storage, folder, manifest
        self.per_shard = manifest.shards[0].stop - manifest.shards[0].start
        self.loaded: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def batch(self, indices: np.ndarray) -> Batch:
        spec = self.manifest.spec
        states: list[Tensor] = []
        labels: list[Tensor] = []
        for index in indices:
            shard, row = divmod(int(index), self.per_shard)
            tensors = self._shard(shard)
            states.append(tensors["states"][:, row])
            if "labels" in tensors:
                labels.append(tensors["labels"][row])
        noise = sample_noise(spec["seed"], map(int, indices), tuple(spec["shape"]))
        return Batch(indices, noise, torch.stack(states).float(), torch.stack(labels) if labels else None)

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self.loaded:
            shard: Shard = self.manifest.shards[number]
            self.loaded[number] = read_shard(self.storage, self.folder, shard)
            while len(self.loaded) > 2 * WINDOW_SHARDS:
                self.loaded.popitem(last=False)
        self.loaded.move_to_end(number)
        return self.loaded[number]
