"""The Ray actor of an evaluation, which draws or reads a block of images and extracts their features."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
from dsno_cluster.evaluation.kept_rows import KeptRows
from dsno_cluster.evaluation.metrics import FRECHET, BlockResult, layers_by_row
from dsno_cluster.evaluation.nearest_picture import shown_samples
from dsno_cluster.evaluation.pictures import Pictured, layout, solve_pictured
from dsno_cluster.evaluation.records import Cost
from dsno_cluster.evaluation.sources import STUDENT, Block, ImageSource, MeasuredBlock, TrajectoryError
from dsno_cluster.features.extractors import Extractor, Readings, WeightsFile, load_extractor
from dsno_cluster.features.statistics import moments_on_device
from dsno_cluster.image_sets.opening import open_images
from dsno_cluster.images import to_uint8
from dsno_cluster.storage import open_storage
from dsno_cluster.students.dsno import load_student
from dsno_cluster.teachers import States, find_teacher
from dsno_cluster.trajectories.generate import kernels_folder
from dsno_cluster.trajectories.shards import Shard, write_shard
from dsno_cluster.trajectories.solve_actor import check_teacher
from dsno_cluster.trajectories.spec import TrajectorySpec, solve_samples

Result = TypeVar("Result")

TIMED_PAIRS = 5  # calls of student and teacher, whose median ratio is the cost


@dataclass(frozen=True)
class StudentAtWork:
    """A student by its address and the sha256 of its weights, and the `spec` of its teacher's trajectories.

    `states` says what they are, and what decodes them. `keep` is the folder for its samples; None: they are not kept.
    """

    address: str
    sha256: str
    spec: TrajectorySpec
    states: States
    keep: str | None = None


@dataclass(frozen=True)
class Images:
    """Images from sample `start`, uint8 (N, C, H, W), and their classes (N,) if known, both on CPU."""

    start: int
    images: Tensor
    labels: Tensor | None


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
        # torch reads it when a network is compiled
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", kernels_folder(config))
        self.config, self.readings, self.work = config, readings, student
        settings, endpoint = config.evaluation, config.storage.endpoint_url
        threads = settings.threads
        torch.set_num_threads(threads)
        # one thread each: while features of one block are extracted, the next is drawn or read. The number of
        # CPU threads is also a property of the calling thread
        self.drawing, self.extracting = (
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) for _ in range(2)
        )
        self.keeping, self.made_by = ThreadPoolExecutor(1), self.environment()
        self.device = compute_device()
        self.storage = open_storage(config.storage.root, endpoint)
        if student is not None:
            loaded = load_student(
                student.address,
                endpoint,
                ema=settings.ema_decay,
                sha256=student.sha256,
            ).to(self.device)
            loaded.accelerate(
                precision=settings.precision,
                compile=bool(settings.compile),
                # samples and trajectories of whole batches; the last, smaller ones are not worth another compilation
                only=lambda images, _points: images == settings.batch_size,
                graphs=bool(settings.compile) and self.device.type == "cuda" and loaded.is_small,
            )
            self.student, self.spec = loaded, student.spec
            states = student.states
            self.decoder = states.decoder.load(self.device, settings.precision) if states.decoder else None
            self.kept_rows = KeptRows(
                self.storage, student.spec, settings, states.identity(settings.precision)
            )
            found = find_teacher(config)
            # tf32 would hold for the whole process, and so for the features that another thread extracts
            self.teacher = found.load().to(self.device).without_tf32()
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
                batches, keeping = self.drawing.submit(self._batches, block).result()
                measured = self.extracting.submit(self._measure, block, batches).result()
                for kept in keeping:
                    kept.result()
                return measured
            case "trajectory":
                return self.drawing.submit(self._trajectory_error, block).result()
            case "cost":
                return self._undisturbed(lambda: self._cost(block))
            case "pictures":
                return self._undisturbed(self._pictured)

    def _undisturbed(self, call: Callable[[], Result]) -> Result:
        """Call once both threads are idle, which may still work on a block that is no longer needed."""
        return self.extracting.submit(lambda: self.drawing.submit(call).result()).result()

    def _pictured(self) -> Pictured:
        found = solve_pictured(self.config, self.spec, self.student, self.teacher, self.decoder)
        reading = self.readings.get(STUDENT, {}).get("nearest")
        if reading is None:
            return found
        shown = to_uint8(shown_samples(layout(self.config), found.ours))
        features = self.extractors[reading.extractor](shown)[reading.layer]
        return replace(found, features=features.cpu().numpy())

    def _batches(self, block: Block) -> tuple[list[Images], list[Future[None]]]:
        """The block's images, and what must be done before they count as kept."""
        source, size = block.source, self.config.evaluation.batch_size
        if source.kind == "images":
            found = self.images(source.address)
            known = found.labels(block.start, block.stop)
            return [Images(block.start, found.read(block.start, block.stop), known)], []
        batches, keeping = [], []
        for start in range(block.start, block.stop, size):
            samples = range(start, min(start + size, block.stop))
            if source.sampling is None:
                batches.append(self._drawn(source, samples))
                continue
            where = source.sampling, self.made_by, samples
            if (before := self.kept_rows.read(*where)) is not None:
                batches.append(Images(start, before, self._labels(samples)))
                continue
            batches.append(self._drawn(source, samples))
            keeping.append(self.keeping.submit(self.kept_rows.keep, *where, batches[-1].images))
        return batches, keeping

    def _drawn(self, source: ImageSource, samples: range) -> Images:
        noise, labels = self._inputs(samples)
        if source.sampling is None:
            states = self.student.sample(noise, labels)
        else:
            sampling = source.sampling
            states = solve_with(sampling.method, self.teacher, noise, sampling.times, labels)[:, -1]
        parts = [states] if self.decoder is None else self.decoder.parts(states)
        return Images(samples.start, torch.cat([to_uint8(part).cpu() for part in parts]), labels)

    def _measure(self, block: Block, batches: list[Images]) -> MeasuredBlock:
        readings = self.readings[block.source]
        found = {
            f"{name}/{layer}": torch.cat([features[layer] for features in by_batch])
            for name in dict.fromkeys(reading.extractor for reading in readings.values())
            for by_batch in [[self.extractors[name](batch.images) for batch in batches]]
            for layer in by_batch[0]
        }
        agreeing = 0
        if "agreement" in readings:
            seen = found[readings["agreement"].key].argmax(1).cpu()
            labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
            agreeing = int((seen == labels).sum())
        moments = {
            metric: moments_on_device(found[readings[metric].key]) for metric in FRECHET if metric in readings
        }
        features = {
            key: found[key].cpu().numpy() for key in layers_by_row(readings, block.source.is_reference)
        }
        kept = [self._kept(batch) for batch in batches] if self._keeps(block) else []
        return MeasuredBlock(BlockResult(moments, features, agreeing), tuple(kept))

    def _keeps(self, block: Block) -> bool:
        return block.source.kind == "student" and self.work is not None and self.work.keep is not None

    def _kept(self, batch: Images) -> Shard:
        assert self.work is not None and self.work.keep is not None
        tensors = {"images": batch.images} | ({} if batch.labels is None else {"labels": batch.labels})
        index = batch.start // self.config.evaluation.batch_size
        return write_shard(self.storage, self.work.keep, index, batch.start, tensors)

    def _labels(self, indices: range) -> Tensor | None:
        # they stay on the CPU, where the student checks them without waiting for a GPU
        seed, classes = self.config.evaluation.seed, self.student.network.num_classes
        return sample_labels(seed, indices, classes) if classes else None

    def _inputs(self, indices: range) -> tuple[Tensor, Tensor | None]:
        noise = sample_noise(self.config.evaluation.seed, indices, self.teacher.shape).to(self.device)
        return noise, self._labels(indices)

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
