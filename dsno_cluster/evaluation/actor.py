"""The Ray actor of an evaluation, which draws or reads a block of images and extracts their features."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.cluster.ray_pool import PoolActor
from dsno_cluster.config import Config
from dsno_cluster.device import compute_device
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.diffusion.solvers import solve_with
from dsno_cluster.evaluation.features import Extractor, Readings, WeightsFile, load_extractor
from dsno_cluster.evaluation.image_sets import open_images
from dsno_cluster.evaluation.metrics import BlockResult, layers_by_row
from dsno_cluster.evaluation.pictures import Pictured, solve_pictured
from dsno_cluster.evaluation.records import Cost
from dsno_cluster.evaluation.sources import Block, ImageSource, MeasuredBlock, TrajectoryError
from dsno_cluster.evaluation.statistics import moments_of
from dsno_cluster.images import to_uint8
from dsno_cluster.storage import open_storage
from dsno_cluster.students.dsno import load_student
from dsno_cluster.teachers import find_teacher
from dsno_cluster.trajectories.generate import check_teacher, kernels_folder
from dsno_cluster.trajectories.shards import Shard, write_shard
from dsno_cluster.trajectories.spec import TrajectorySpec, solve_samples

Result = TypeVar("Result")

TIMED_PAIRS = 5  # calls of student and teacher, whose median ratio is the cost


@dataclass(frozen=True)
class StudentAtWork:
    """A student by its address and the sha256 of its weights, and the `spec` of its teacher's trajectories.

    `keep` is the folder for its samples; None: they are not kept.
    """

    address: str
    sha256: str
    spec: TrajectorySpec
    keep: str | None = None


class EvaluationActor(PoolActor):
    """Holds the extractors and, if given, the `student` with its teacher.

    `readings`: the layers that metrics read.
    """

    def __init__(
        self,
        config: Config,
        weights: dict[str, WeightsFile],
        readings: dict[ImageSource, Readings],
        student: StudentAtWork | None = None,
    ) -> None:
        super().__init__()
        self.config, self.readings, self.work = config, readings, student
        settings, endpoint = config.evaluation, config.storage.endpoint_url
        threads = settings.threads
        torch.set_num_threads(threads)
        # one thread each: while features of one block are extracted, the next is drawn or read. The number of
        # CPU threads is also a property of the calling thread
        self.drawing, self.extracting = (
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) for _ in range(2)
        )
        self.device = compute_device()
        self.storage = open_storage(config.storage.root, endpoint)
        if student is not None:
            loaded = load_student(
                student.address,
                endpoint,
                ema=settings.ema_decay,
                sha256=student.sha256,
            ).to(self.device)
            if settings.compile:
                os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", kernels_folder(config))
            loaded.accelerate(
                precision=settings.precision,
                compile=bool(settings.compile),
                # samples and trajectories of whole batches; the last, smaller ones are not worth another compilation
                only=lambda images, _points: images == settings.batch_size,
                graphs=bool(settings.compile) and self.device.type == "cuda" and loaded.is_small,
            )
            self.student, self.spec = loaded, student.spec
            found = find_teacher(config)
            # tf32 would hold for the whole process, and so for the features that another thread extracts
            self.teacher = replace(found.load().to(self.device), tf32=False)
            check_teacher(student.spec, self.teacher, found.path)
        layers: dict[str, list[str]] = {}
        for reading in (reading for of_source in readings.values() for reading in of_source.values()):
            layers.setdefault(reading.extractor, []).append(reading.layer)
        self.extractors: dict[str, Extractor] = {
            name: load_extractor(weights[name], dict.fromkeys(wanted)) for name, wanted in layers.items()
        }
        self.images = lru_cache(4)(lambda address: open_images(address, endpoint, config.data))

    def run(self, block: Block) -> MeasuredBlock | TrajectoryError | Cost | Pictured:
        """The result of a block's work."""
        match block.work:
            case "features":
                images, labels = self.drawing.submit(self._images, block).result()
                return self.extracting.submit(self._measure, block, images, labels).result()
            case "trajectory":
                return self.drawing.submit(self._trajectory_error, block).result()
            case "cost":
                return self._undisturbed(lambda: self._cost(block))
            case "pictures":
                return self._undisturbed(
                    lambda: solve_pictured(self.config, self.spec, self.student, self.teacher)
                )

    def _undisturbed(self, call: Callable[[], Result]) -> Result:
        """Call once both threads are idle, which may still work on a block that is no longer needed."""
        return self.extracting.submit(lambda: self.drawing.submit(call).result()).result()

    def _images(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """The block's images, uint8 (N, C, H, W), and their classes (N,) if known, both on CPU."""
        source = block.source
        if source.kind == "images":
            found = self.images(source.address)
            known = found.labels and found.labels(block.start, block.stop)
            return found.read(block.start, block.stop), known
        noise, labels = self._inputs(range(block.start, block.stop))
        if source.sampling is None:
            states = self.student.sample(noise, labels)
        else:
            sampling = source.sampling
            states = solve_with(sampling.method, self.teacher, noise, sampling.times, labels)[:, -1]
        return to_uint8(states).cpu(), labels

    def _measure(self, block: Block, images: Tensor, labels: Tensor | None) -> MeasuredBlock:
        readings = self.readings[block.source]
        found = {
            f"{name}/{layer}": rows.numpy()
            for name in dict.fromkeys(reading.extractor for reading in readings.values())
            for layer, rows in self.extractors[name](images).items()
        }
        agreeing = 0
        if "agreement" in readings:
            assert labels is not None
            agreeing = int((found[readings["agreement"].key].argmax(1) == labels.numpy()).sum())
        moments = moments_of(found[readings["fid"].key]) if "fid" in readings else None
        features = {key: found[key] for key in layers_by_row(readings)}
        return MeasuredBlock(BlockResult(moments, features, agreeing), self._kept(block, images, labels))

    def _kept(self, block: Block, images: Tensor, labels: Tensor | None) -> Shard | None:
        if block.source.kind != "student" or self.work is None or self.work.keep is None:
            return None
        tensors = {"images": images} | ({} if labels is None else {"labels": labels})
        index = block.start // self.config.evaluation.batch_size
        return write_shard(self.storage, self.work.keep, index, block.start, tensors)

    def _inputs(self, indices: range) -> tuple[Tensor, Tensor | None]:
        seed, classes = self.config.evaluation.seed, self.student.network.num_classes
        noise = sample_noise(seed, indices, self.teacher.shape).to(self.device)
        # labels stay on the CPU, where the student checks them without waiting for a GPU
        return noise, sample_labels(seed, indices, classes) if classes else None

    def _trajectory_error(self, block: Block) -> TrajectoryError:
        indices = range(block.start, block.stop)
        target, _ = solve_samples(self.spec, self.teacher, self.config.evaluation.seed, indices)
        noise, labels = self._inputs(indices)
        target = target.to(self.device)  # a teacher without a network computes on the CPU
        difference = self.student.trajectory(noise, labels, self.spec.times) - target
        sums = [x.double().square().sum(dim=(0, 2, 3, 4)).cpu().numpy() for x in (difference, target)]
        return TrajectoryError(sums[0], sums[1])

    def _cost(self, block: Block) -> Cost:
        """The median ratio of the times of student and teacher, called in turn on the samples of a block."""
        noise, labels = self._inputs(range(block.start, block.stop))

        def seconds(call: Callable[[], Tensor]) -> float:
            began = time.perf_counter()
            call().cpu()  # waits for a GPU
            return time.perf_counter() - began

        def student() -> Tensor:
            return self.student.sample(noise, labels)

        def teacher() -> Tensor:
            return self.teacher(noise, 1.0, labels)

        student(), teacher()
        times = [(seconds(student), seconds(teacher)) for _ in range(TIMED_PAIRS)]
        return Cost(
            cost_in_teacher_evaluations=float(np.median([s / t for s, t in times])),
            images_per_second=len(noise) / float(np.median([s for s, _ in times])),
        )
