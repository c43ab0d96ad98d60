"""Reading shards for training: each sample once per epoch, in an order that depends only on (seed, epoch).

The position of a run is one number: the samples that it has read. Global batches are consecutive samples
along the epochs' orders, so batch b has the same samples on 1 rank or on 8, and a run saved on 8 ranks can
continue on 4.

Every shard is checked against the manifest's sha256 before its samples are used: for a file in a folder or in
the cache, which is then mapped into memory, once per process; otherwise at each download.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import OrderedDict, deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.config import Reader
from dsno_cluster.config.paths import on_this_node
from dsno_cluster.diffusion.noise import noise_checksum, sample_noise
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import locked
from dsno_cluster.storage import FolderStorage, Storage
from dsno_cluster.trajectories.shards import (
    Manifest,
    Shard,
    missing_shard,
    problem_of,
    read_header,
    read_manifest,
    read_shard_bytes,
    trajectory_spec,
)
from dsno_cluster.trajectories.spec import AnySpec, TrajectorySpec

Arrays = dict[str, np.ndarray]

_DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64}


@dataclass(frozen=True)
class Batch:
    """Samples: indices (N,), starting noise (N, C, H, W), states (N, M, C, H, W) float32, labels (N,).

    An objective that reads no trajectories gets `blank_batch`es.
    """

    indices: np.ndarray
    noise: Tensor
    states: Tensor
    labels: Tensor | None

    def pinned(self) -> Batch:
        """This batch in memory from which a GPU copies by itself."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return Batch(self.indices, self.noise.pin_memory(), self.states.pin_memory(), labels)


def blank_batch(count: int, shape: tuple[int, ...]) -> Batch:
    """A batch that only says how many samples of which shape are asked for: no indices, noise of zeros and no states."""
    noise = torch.zeros(1).expand(count, *shape)
    return Batch(np.empty(0, np.int64), noise, noise[:, None][:, :0], None)


def open_trajectories(storage: Storage, folder: str, num_samples: int) -> Manifest:
    """The manifest of a finished data set with at least `num_samples`, cut to those.

    Raises UserError if it is missing or too small, and if this machine cannot regenerate its noise.
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
    check_noise(trajectory_spec(manifest, f"{storage.url}/{folder}"), f"{storage.url}/{folder}")
    shards = tuple(shard for shard in manifest.shards if shard.start < num_samples)
    return manifest.model_copy(update={"shards": shards, "num_samples": shards[-1].stop})


def check_noise(spec: AnySpec, where: str) -> None:
    """Raises UserError, naming `where`, if this machine cannot regenerate a data set's noise."""
    if not isinstance(spec, TrajectorySpec):
        return  # it is stored
    if noise_checksum(spec.seed, spec.shape) != spec.noise.first_sample_sha256:
        raise UserError(
            f"{where}: this machine's numpy gives other noise for the same seed ({spec.noise.generator}); "
            "use the numpy version of the manifest's environment"
        )


def epoch_order(
    manifest: Manifest, seed: int, epoch: int, window: int = Reader().window_shards, shuffle: str = "window"
) -> np.ndarray:
    """The samples of an epoch in reading order, (num_samples,) int64: each exactly once.

    window: shards in random order, then samples in random order within each `window` of them; none: as made.
    """
    if shuffle == "none":
        return np.arange(manifest.num_samples)
    random = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    shards = [manifest.shards[i] for i in random.permutation(len(manifest.shards))]
    windows = [shards[i : i + window] for i in range(0, len(shards), window)]
    return np.concatenate([
        random.permutation(np.concatenate([np.arange(s.start, s.stop) for s in part])) for part in windows
    ])  # fmt: skip


def read_batches(
    shards: ShardReader,
    *,
    seed: int,
    first_sample: int,
    batch_size: int,
    rank: int,
    world_size: int,
    accumulation: int = 1,
) -> Generator[list[Batch], None, None]:
    """This rank's part of the global batch that starts with sample `first_sample`, and of every one after it.

    A list has `accumulation` micro-batches. Global batches are `batch_size` consecutive samples along the
    epochs' orders, one epoch after the other, without end; `first_sample` counts the samples read so far,
    over all epochs and ranks. The next batches are read in the background; an error there is raised here, at
    its batch.
    """
    micro = batch_size // (world_size * accumulation)
    manifest, settings = shards.manifest, shards.settings

    @functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
    def order(epoch: int) -> np.ndarray:
        return epoch_order(manifest, seed, epoch, settings.window_shards, settings.shuffle)

    def load(first: int) -> list[Batch]:
        epochs, within = np.divmod(np.arange(batch_size) + first, manifest.num_samples)
        flat = np.empty(batch_size, np.int64)
        for epoch in np.unique(epochs):
            flat[epochs == epoch] = order(int(epoch))[within[epochs == epoch]]
        indices = flat.reshape(accumulation, world_size, micro)[:, rank]
        batches = [shards.batch(part) for part in indices]
        return [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches

    with ThreadPoolExecutor(1) as ahead:
        pending: deque[Future[list[Batch]]] = deque()
        try:
            while True:
                while len(pending) <= settings.prefetch_batches:
                    pending.append(ahead.submit(load, first_sample))
                    first_sample += batch_size
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class ShardReader:
    """Samples by index; the most recently used shards are kept open."""

    def __init__(
        self,
        storage: Storage,
        folder: str,
        manifest: Manifest,
        settings: Reader = Reader(),  # noqa: B008 (frozen)
    ) -> None:
        self.storage, self.folder, self.manifest, self.settings = storage, folder, manifest, settings
        self.spec = trajectory_spec(manifest, f"{storage.url}/{folder}")
        self.per_shard = manifest.per_shard
        self.opened: OrderedDict[int, Arrays] = OrderedDict()
        self.checked: set[int] = set()

    def batch(self, indices: np.ndarray) -> Batch:
        states, labels = self.samples(indices)
        return Batch(indices, self.noise(indices), states.float(), labels)

    def noise(self, indices: np.ndarray) -> Tensor:
        """Starting noise (N, C, H, W) float32: that of the seed or, for imported trajectories, the stored one."""
        if isinstance(self.spec, TrajectorySpec):
            return sample_noise(self.spec.seed, map(int, indices), self.spec.shape)
        noise = np.empty((len(indices), *self.spec.shape), np.float32)
        numbers, rows = np.divmod(indices, self.per_shard)
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number)
            noise[where] = self._shard(int(number))["noise"][rows[where]]
        return torch.from_numpy(noise)

    def samples(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """States (N, M, C, H, W) in the stored dtype, and labels (N,) if there are classes."""
        numbers, rows = np.divmod(indices, self.per_shard)
        states: np.ndarray | None = None
        labels: np.ndarray | None = None
        for number in np.unique(numbers):
            arrays = self._shard(int(number))
            where = np.flatnonzero(numbers == number)
            part_MNCHW = arrays["states"].take(rows[where], axis=1)
            if states is None:
                shape = (len(indices), part_MNCHW.shape[0], *part_MNCHW.shape[2:])
                states = np.empty(shape, part_MNCHW.dtype)
                labels = np.empty(len(indices), np.int64) if "labels" in arrays else None
            states[where] = part_MNCHW.swapaxes(0, 1)
            if labels is not None:
                labels[where] = arrays["labels"][rows[where]]
        assert states is not None
        return torch.from_numpy(states), None if labels is None else torch.from_numpy(labels)

    def _shard(self, number: int) -> Arrays:
        if number not in self.opened:
            self.opened[number] = self._open(number)
            while len(self.opened) > 2 * self.settings.window_shards:
                self.opened.popitem(last=False)
        self.opened.move_to_end(number)
        return self.opened[number]

    def _open(self, number: int) -> Arrays:
        shard, trusted = self.manifest.shards[number], number in self.checked
        if isinstance(self.storage, FolderStorage):
            data = _mapped_file(self.storage, self.folder, shard, trusted)
        elif self.settings.cache_dir is not None:
            data = cached_shard(self.settings, self.storage, self.folder, shard, trusted)
        else:
            data = np.frombuffer(read_shard_bytes(self.storage, self.folder, shard), np.uint8)
        self.checked.add(number)
        return parse_shard(data)


def parse_shard(data: np.ndarray) -> Arrays:
    """The tensors of a safetensors file (bytes,) uint8, as views of it."""
    header, begin = read_header(data.data)
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (begin + offset for offset in entry["data_offsets"])
            arrays[name] = data[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _mapped_file(storage: FolderStorage, folder: str, shard: Shard, trusted: bool) -> np.ndarray:
    if not trusted:
        read_shard_bytes(storage, folder, shard)
    path = storage.root / folder / shard.key
    try:
        return np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        raise missing_shard(str(path)) from None
    except (OSError, ValueError) as error:
        raise WorkError(f"{path}: cannot be read: {error}") from error


def cached_shard(
    settings: Reader, storage: Storage, folder: str, shard: Shard, trusted: bool = False
) -> np.ndarray:
    """The file of a shard, mapped from the cache, (bytes,) uint8; downloaded if it is missing or wrong.

    Files are named by their sha256, so that data sets can share a cache, and checked unless `trusted`.
    Processes that want the same shard wait for the one that downloads it. When the cache outgrows `cache_gb`,
    the least recently used files are deleted; a process that has one mapped keeps its content. A crash leaves
    complete files and, at worst, hidden temporary ones, which are removed when they are a day old.
    """
    assert settings.cache_dir is not None
    cache = FolderStorage(on_this_node(settings.cache_dir, "reader.cache_dir"))
    name = f"{shard.sha256}.safetensors"
    path = cache.root / name
    try:
        _own_folder(cache.root)
        with locked(cache.root / f".{shard.sha256[:2]}.lock"):
            with contextlib.suppress(OSError, ValueError):  # missing, truncated, or just evicted
                data = np.memmap(path, np.uint8, "r")
                if trusted or problem_of(data.data, shard) is None:
                    os.utime(path)
                    return data
            cache.write(name, read_shard_bytes(storage, folder, shard))
            data = np.memmap(path, np.uint8, "r")
        _evict(cache, settings.cache_gb * 1e9, keep=name)
    except OSError as error:
        raise WorkError(f"reader.cache_dir: {path}: {error.strerror}") from error
    return data


def _own_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter. Raises WorkError if it belongs to another user."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise WorkError(f"reader.cache_dir: {folder} belongs to another user; name a folder of your own")


def _evict(cache: FolderStorage, limit: float, keep: str) -> None:
    """Delete the least recently used files until at most `limit` bytes are left."""
    cache.tidy("")
    with locked(cache.root / ".evict.lock"):
        files = []
        for path in cache.root.glob("*.safetensors"):
            found = path.stat()
            files.append((found.st_mtime_ns, found.st_size, path.name))
        total = sum(size for _, size, _ in files)
        for _, size, name in sorted(files):
            if total > limit and name != keep:
                cache.delete(name)
                total -= size
