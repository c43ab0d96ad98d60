"""The Ray actor of an evaluation: draws or reads a block of images and extracts their features."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.device import compute_device
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.diffusion.solvers import Method, solve_with
from dsno_cluster.evaluation.features import Extractor, Reading, WeightsFile, load_extractor
from dsno_cluster.evaluation.image_sets import ImageSet, open_images
from dsno_cluster.evaluation.metrics import BlockResult, layers_by_row
from dsno_cluster.evaluation.pictures import Pictured, solve_pictured
from dsno_cluster.evaluation.statistics import moments_of
from dsno_cluster.images import to_uint8
from dsno_cluster.provenance import Environment, environment
from dsno_cluster.storage import open_storage
from dsno_cluster.students.dsno import load_student
from dsno_cluster.teachers import find_teacher
from dsno_cluster.trajectories.shards import Shard, write_shard
from dsno_cluster.trajectories.spec import solve_samples, spec_of


@dataclass(frozen=True)
class Source:
    """Where images come from: the student, the teacher by a solver in `steps` intervals through `times`, or an image set."""

    kind: str  # "student", "teacher" or "images"
    solver: str = ""
    steps: int = 0
    times: tuple[float, ...] = (0.0,)
    grid: str = "uniform"
    address: str = ""
    is_reference: bool = False  # else images that are compared with it, which may be the same ones

    @property
    def title(self) -> str:
        return f"teacher, {self.solver}" if self.kind == "teacher" else self.address or self.kind


STUDENT = Source("student")


@dataclass(frozen=True)
class Block:
    """One task of the pool: what to do with samples [start, stop)."""

    work: str  # "features" or "trajectory"
    source: Source
    start: int
    stop: int


class EvaluationActor:
    """Holds the extractors and, where `student` names one by address and sha256, the student and its teacher.

    `read` says what each metric reads, by source; `keep` is the folder for the student's samples, None to keep none.
    """

    def __init__(
        self,
        config: Config,
        weights: dict[str, WeightsFile],
        read: dict[Source, dict[str, Reading]],
        student: tuple[str, str] | None = None,
        keep: str | None = None,
    ) -> None:
        self.config, self.read, self.keep = config, read, keep
        settings, endpoint = config.evaluation, config.storage.endpoint_url
        threads = settings.threads
        torch.set_num_threads(threads)
        # a thread each: while features of one block are extracted the next is drawn or read. The number of threads is a
        # property of the calling thread too
        self.drawing, self.extracting = (
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) for _ in range(2)
        )
        self.device = compute_device()
        self.storage = open_storage(config.storage.root, endpoint)
        if student is not None:
            address, sha256 = student
            loaded = load_student(
                address,
                endpoint,
                ema=settings.ema_decay,
                sha256=sha256,
                precision=settings.precision,
                compile=settings.compile,
            )
            self.student = loaded.to(self.device)
            found = find_teacher(config)
            self.teacher, self.spec = found.load().to(self.device), spec_of(config, found)
        layers: dict[str, list[str]] = {}
        for reading in (reading for of_source in read.values() for reading in of_source.values()):
            layers.setdefault(reading.extractor, []).append(reading.layer)
        self.extractors: dict[str, Extractor] = {
            name: load_extractor(weights[name], dict.fromkeys(wanted)) for name, wanted in layers.items()
        }
        self.images = lru_cache(4)(lambda address: open_images(address, endpoint))

    def run(self, block: Block) -> Any:
        """A BlockResult and the line of a kept shard or None; for "trajectory" the sums of squares of `_trajectory_error`."""
        if block.work == "trajectory":
            return self.drawing.submit(self._trajectory_error, block).result()
        images, labels = self.drawing.submit(self._images, block).result()
        return self.extracting.submit(self._measure, block, images, labels).result()

    def _images(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """The block's images, uint8 (N, C, H, W), and their classes (N,) where known, both on CPU."""
        if block.source.kind == "images":
            found: ImageSet = self.images(block.source.address)
            known = found.labels and found.labels(block.start, block.stop)
            return found.read(block.start, block.stop), known
        noise, labels = self._inputs(range(block.start, block.stop))
        if block.source.kind == "student":
            states = self.student.sample(noise, labels)
        else:
            settings = self.config.trajectories
            source = block.source
            guidance, clip = settings.guidance_scale, settings.clip_denoised
            method = Method(source.solver, source.steps, source.grid, guidance, clip)
            states = solve_with(method, self.teacher, noise, source.times, labels)[:, -1]
        return to_uint8(states).cpu(), None if labels is None else labels.cpu()

    def _measure(
        self, block: Block, images: Tensor, labels: Tensor | None
    ) -> tuple[BlockResult, Shard | None]:
        read = self.read[block.source]
        found = {
            f"{name}/{layer}": rows.numpy()
            for name in dict.fromkeys(reading.extractor for reading in read.values())
            for layer, rows in self.extractors[name](images).items()
        }
        agreeing = 0
        if "agreement" in read:
            assert labels is not None
            agreeing = int((found[read["agreement"].key].argmax(1) == labels.numpy()).sum())
        moments = moments_of(found[read["fid"].key]) if "fid" in read else None
        features = {key: found[key] for key in layers_by_row(read)}
        return BlockResult(moments, features, agreeing), self._kept(block, images, labels)

    def _kept(self, block: Block, images: Tensor, labels: Tensor | None) -> Shard | None:
        if self.keep is None or block.source.kind != "student":
            return None
        tensors = {"images": images} | ({} if labels is None else {"labels": labels})
        index = block.start // self.config.evaluation.batch_size
        return write_shard(self.storage, self.keep, index, block.start, tensors)

    def _inputs(self, indices: range) -> tuple[Tensor, Tensor | None]:
        seed, classes = self.config.evaluation.seed, self.student.network.num_classes
        noise = sample_noise(seed, indices, self.teacher.shape).to(self.device)
        return noise, sample_labels(seed, indices, classes).to(self.device) if classes else None

    def _trajectory_error(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Sums over held-out samples of squared differences and squares, each (M,) float64."""
        indices = range(block.start, block.stop)
        target, _ = solve_samples(self.spec, self.teacher, self.config.evaluation.seed, indices)
        noise, labels = self._inputs(indices)
        difference = self.student.trajectory(noise, labels, self.config.trajectories.time_points) - target
        sums = [x.double().square().sum(dim=(0, 2, 3, 4)).cpu().numpy() for x in (difference, target)]
        return sums[0], sums[1]

    def environment(self) -> Environment:
        return environment()

    def pictured(self) -> Pictured:
        """States of the same noises for the pictures, after what either thread still does."""
        return self.extracting.submit(lambda: self.drawing.submit(self._pictured).result()).result()

    def _pictured(self) -> Pictured:
        return solve_pictured(self.config, self.spec, self.student, self.teacher)

    def measure_cost(self, pairs: int = 5) -> dict[str, float]:
        """What one student sample costs in teacher evaluations: the median ratio of `pairs` run in turn.

        After what either thread still does: a block that another actor was faster with.
        """
        return self.extracting.submit(lambda: self.drawing.submit(self._cost, pairs).result()).result()

    def _cost(self, pairs: int) -> dict[str, float]:
        noise, labels = self._inputs(range(self.config.evaluation.batch_size))

        def seconds(call: Any) -> float:
            began = time.perf_counter()
            call().cpu()  # waits for a GPU
            return time.perf_counter() - began

        def student() -> Tensor:
            return self.student.sample(noise, labels)

        def teacher() -> Tensor:
            return self.teacher(noise, 1.0, labels)

        student(), teacher()
        times = [(seconds(student), seconds(teacher)) for _ in range(pairs)]
        rate = len(noise) / float(np.median([s for s, _ in times]))
        return {
            "cost_in_teacher_evaluations": float(np.median([s / t for s, t in times])),
            "images_per_second": rate,
        }
