"""The Ray actor that makes shards of trajectories."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor

from dsno_cluster.cluster.ray_pool import PoolActor
from dsno_cluster.config import StorageConfig, TeacherConfig
from dsno_cluster.diffusion.noise import noise_checksum
from dsno_cluster.diffusion.schedule import same_times
from dsno_cluster.errors import UserError
from dsno_cluster.storage import open_storage
from dsno_cluster.teachers import Teacher
from dsno_cluster.teachers.of_config import check_planned_grid, load_of_config
from dsno_cluster.trajectories.shards import Shard, put_shard
from dsno_cluster.trajectories.spec import TrajectorySpec, solve_shard


class SolveActor(PoolActor):
    """A Ray actor that holds a teacher and makes shards of `spec` below `folder` of a storage.

    The kernels of a compiled teacher are kept in the folder `kernels`. `auto_grid`: the config leaves the grid to the
    teacher.

    Raises UserError if the teacher that it loads is not the spec's.
    """

    def __init__(
        self,
        spec: TrajectorySpec,
        teacher: TeacherConfig,
        storage: StorageConfig,
        folder: str,
        kernels: str | None = None,
        auto_grid: bool = False,
    ) -> None:
        if kernels is not None:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", kernels)  # before torch reads it
        import torch

        from dsno_cluster.device import compute_device

        super().__init__()
        torch.set_num_threads(spec.threads)  # bits depend on it
        # the number of threads is also a property of the calling thread, so all solving is done in this one
        self.compute = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(spec.threads,))
        self.spec, self.folder = spec, folder
        loaded = load_of_config(
            teacher, storage.endpoint_url, precision=spec.inference_precision, compile=spec.compiled
        )
        check_teacher(spec, loaded, str(teacher.path))
        if auto_grid:  # a factory's steps are known only now
            check_planned_grid(loaded, spec.steps, not isinstance(spec.grid, str), str(teacher.path))
        self.teacher = loaded.to(compute_device())
        self.storage = open_storage(storage.root, storage.endpoint_url)

    def make_shard(self, index: int, replace: str | None = None) -> tuple[Shard, str]:
        """Solve, encode and write shard `index`; returns its line for the manifest and its object's etag.

        `replace` is the etag of a bad object to replace. Raises WorkError as `put_shard` does.
        """
        tensors = self.compute.submit(solve_shard, self.spec, self.teacher, index).result()
        start = index * self.spec.samples_per_shard
        return put_shard(self.storage, self.folder, index, start, tensors, replace)


def check_teacher(spec: TrajectorySpec, teacher: Teacher, path: str) -> None:
    """Raises UserError unless `teacher`, as this process loaded it, is the one that the spec was made with."""
    info = teacher.info
    own_steps = None if isinstance(spec.grid, str) else teacher.native_grid(spec.steps)
    same = {
        "teacher": spec.teacher in (info.identity, *info.former_identities),
        "guide": spec.guide == (teacher.guide and teacher.guide.identity),
        "grid": own_steps is None or isinstance(spec.grid, str) or same_times(own_steps, spec.grid),
        "shape": teacher.shape == spec.shape,
        "labels": teacher.num_classes == spec.labels.num_classes,
        "noise": noise_checksum(spec.seed, spec.shape) == spec.noise.first_sample_sha256,
    }
    if differing := [key for key, is_same in same.items() if not is_same]:
        raise UserError(
            f"{path}: the teacher changed, or differs on this node ({socket.gethostname()}), since the run "
            f"began (other than planned: {', '.join(differing)}); make it the same everywhere and start again"
        )
