"""eval: Ray actors sample from seeds, extract features and return moments; the driver merges and compares.

Every figure is a function of checkpoint, seeds, counts and weights: blocks of samples are merged in sample
order, so the number of actors changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.cluster.ray_pool import (
    RayCluster,
    actor_count,
    given_address,
    import_ray,
    open_ray,
    run_pool,
)
from dsno_cluster.config import Config
from dsno_cluster.data import load_digits
from dsno_cluster.device import compute_device
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.diffusion.solvers import count_evaluations, solve
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation import pictures
from dsno_cluster.evaluation.features import Extractor, load_extractor
from dsno_cluster.evaluation.statistics import Moments, frechet_distance, merge, moments_of
from dsno_cluster.images import to_uint8
from dsno_cluster.models.dsno import KIND as STUDENT_KIND
from dsno_cluster.models.dsno import load_student
from dsno_cluster.models.weights import package_path, read_meta, software_versions
from dsno_cluster.storage import MissingObject, Storage, open_storage
from dsno_cluster.trajectories.generate import environment, solve_batch
from dsno_cluster.trajectories.plan import find_teacher, grid_name, open_teacher, own_steps, teacher_path
from dsno_cluster.trajectories.shards import Manifest, Shard, commit_manifest, read_manifest, write_shard

SHIPPED_ROWS = "evaluation.json"


@dataclass(frozen=True)
class Source:
    """Where images come from: the student, or the teacher by a solver in `steps` intervals through `times`."""

    kind: str
    solver: str = ""
    steps: int = 0
    times: tuple[float, ...] = (0.0,)
    grid: str = "uniform"

    @property
    def title(self) -> str:
        return "student" if self.kind == "student" else f"teacher, {self.solver}"


STUDENT = Source("student")


@dataclass(frozen=True)
class Reference:
    """Mean (D,) and covariance (D, D) of the real data's features; `count` images, None where not recorded."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None


@dataclass(frozen=True)
class Block:
    """One task of the pool: what to do with samples [start, stop)."""

    work: str  # "moments" or "trajectory"
    source: Source
    start: int
    stop: int


@dataclass(frozen=True)
class BlockResult:
    """Moments of features, how many images are of the class asked for, and the line of a kept shard."""

    moments: Moments
    agreeing: int
    shard: Shard | None


def find_student(config: Config, student_path: str | None) -> tuple[str, dict[str, Any]]:
    """Address and `meta.json` of the student to evaluate: the one at `student_path`, or the config's newest.

    Raises UserError where there is none, where it is not of the config's network, or where there is no teacher.
    """
    path = student_path or f"{config.storage.root.rstrip('/')}/students/{config.name}"
    try:
        meta = read_meta(path, config.storage.endpoint_url, config.evaluation.ema_decay)
    except UserError as error:
        how = (
            "name one that is there"
            if student_path
            else "`dsno-cluster train` makes it; --student names another"
        )
        raise UserError(f"{error}; {how}") from None
    if meta["model"]["kind"] != STUDENT_KIND:
        raise UserError(f"{path}: holds a {meta['model']['kind']!r} model, not a student")
    if meta["model"]["network"] != config.network.model_dump(mode="json"):
        raise UserError(
            f"network: not that of the student at {path}; pass the config that it was trained with"
        )
    if meta["model"]["times"] != list(config.trajectories.time_points):
        raise UserError(
            f"trajectories.times: the student at {path} answers {meta['model']['times']}, "
            f"the config asks for {list(config.trajectories.time_points)}"
        )
    find_teacher(config)
    return path, meta


def evaluate(
    config: Config, student_path: str | None, actors: int | None = None, ray_address: str | None = None
) -> dict[str, Any]:
    """Evaluate the newest student of the config (or the one at `student_path`) against the real data.

    By `actors` Ray actors (None: as many as there is room for), on this machine or on the Ray at `ray_address`.

    Writes metrics.json and the pictures below `<storage.root>/evaluation/<name>/`; returns the metrics.
    Raises UserError where there is no student, no teacher or no reference.
    """
    settings = config.evaluation
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    path, student_meta = find_student(config, student_path)
    samples_spec = {
        "student": student_meta["sha256"],
        "seed": settings.seed,
        "samples_per_shard": settings.batch_size,
        "threads": settings.threads,
        "precision": settings.precision,
        "compile": settings.compile,
    }
    if settings.keep_samples:
        kept = read_manifest(storage, samples_folder(config, student_meta))
        if kept is not None and kept[0].spec != samples_spec:
            raise UserError(
                f"{storage.url}/{samples_folder(config, student_meta)}: holds samples of another evaluation.batch_size, "
                "threads, precision or compile; go back to those, or delete that folder"
            )
    extractor = load_extractor(settings.feature_extractor, settings.weights_path, settings.weights_sha256)
    reference = load_reference(config, extractor)
    spec = comparison_spec(config, extractor)
    stored = stored_teacher_rows(config, storage, spec)
    sources = [STUDENT, *teacher_sources(config)]
    missing = [s for s in sources if s is STUDENT or row_key(s) not in stored]
    console.say(
        f"{settings.num_samples} samples of {path} against {reference.count or 'the'} real images by {extractor.name}, "
        f"{actor_count(actors, settings.threads)}; "
        f"{len(sources) - len(missing)} of the teacher's {len(sources) - 1} rows are stored"
    )
    with open_ray(given_address(ray_address), actors, settings.threads) as cluster:
        remote = import_ray().remote(**cluster.actor_options())(EvaluationActor)
        results = _run_blocks(config, lambda: remote.remote(config, path), missing, cluster)
        probe = remote.remote(config, path)  # alone now, so that nothing disturbs the timing
        cost = import_ray().get(probe.measure_cost.remote())

    rows: dict[str, dict[str, Any]] = {}
    for source in missing:
        blocks = [results[b] for b in blocks_of(config, source)]
        rows[row_key(source)] = make_row(source, config, blocks, reference)
    teacher_rows = {**stored, **{k: v for k, v in rows.items() if k != row_key(STUDENT)}}
    store_teacher_rows(storage, spec, teacher_rows)

    student = rows[row_key(STUDENT)] | cost
    if "trajectory_error" in settings.metrics:
        parts = [results[b] for b in trajectory_blocks(config)]
        error = np.sqrt(sum(p[0] for p in parts) / sum(p[1] for p in parts))
        student["trajectory_error"] = dict(
            zip(map(str, config.trajectories.time_points), error.tolist(), strict=True)
        )
    if settings.keep_samples:
        shards = tuple(results[b].shard for b in blocks_of(config, STUDENT))
        commit_manifest(
            storage, samples_folder(config, student_meta), Manifest(samples_spec, shards, environment())
        )
    metrics = {
        "name": config.name,
        "num_samples": settings.num_samples,
        "reference": {"what": settings.reference, "count": reference.count},
        "feature_extractor": {"name": extractor.name, "weights_sha256": extractor.sha256},
        "seeds": {"noise": settings.seed, "trajectories": config.seed},
        "checkpoint": {
            "path": path,
            "step": student_meta.get("step"),
            "ema_decay": student_meta.get("ema_decay"),
            "sha256": student_meta["sha256"],
        },
        "teacher": find_teacher(config).identity,
        "precision": settings.precision,
        "versions": software_versions(),
        "real_held_out": held_out_row(config, extractor, reference),
        "teacher_rows": [teacher_rows[row_key(s)] for s in sources[1:]],
        "student": student,
        "train_seconds": student_meta.get("train_seconds"),
    }
    metrics["pictures"] = pictures.layout(config)
    folder = f"evaluation/{config.name}/"
    storage.write(folder + "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    student_here = load_student(path, config.storage.endpoint_url, ema=settings.ema_decay)
    for name, png in pictures.pictures(config, student_here, metrics).items():
        storage.write(folder + name, png)
    console.say(f"written: {storage.url}/{folder}{{metrics.json, samples.png, trajectory.png}}")
    return metrics


def teacher_sources(config: Config) -> list[Source]:
    """The teacher's rows of the table: DDIM at several costs, and the solver that made the trajectories."""
    rows = [Source("teacher", "ddim", steps) for steps in config.evaluation.teacher_steps]
    settings = config.trajectories
    grid = grid_name(config) if own_steps(config, find_teacher(config)) is None else "auto"
    made_by = Source("teacher", settings.solver, settings.steps, settings.time_points, grid)
    rows = rows if made_by in rows else [*rows, made_by]
    return sorted(rows, key=lambda source: evaluations_of(source, config))


def evaluations_of(source: Source, config: Config) -> int:
    """Network evaluations of a teacher's row for one image."""
    guidance = config.trajectories.guidance_scale
    native = own_steps(config, find_teacher(config)) if source.grid == "auto" else None
    return count_evaluations(source.solver, source.steps, guidance, source.times, native or source.grid)


def row_key(source: Source) -> str:
    if source.kind == "student":
        return "student"
    grid = "" if source.grid == "uniform" else f" on {source.grid}"
    return f"{source.solver} {source.steps} through {' '.join(map(str, source.times))}{grid}"


def blocks_of(config: Config, source: Source) -> list[Block]:
    return _blocks("moments", source, config.evaluation.num_samples, config.evaluation.batch_size)


def trajectory_blocks(config: Config) -> list[Block]:
    return _blocks("trajectory", STUDENT, config.evaluation.trajectory_samples, config.evaluation.batch_size)


def _blocks(work: str, source: Source, count: int, size: int) -> list[Block]:
    return [Block(work, source, start, min(start + size, count)) for start in range(0, count, size)]


def samples_folder(config: Config, student_meta: dict[str, Any]) -> str:
    return f"samples/{student_meta['sha256'][:16]}-{config.evaluation.seed}/"


def comparison_spec(config: Config, extractor: Extractor) -> dict[str, Any]:
    """What a teacher's stored row must agree in to stand beside the student's."""
    settings, precision = config.evaluation, config.teacher.precision
    return {
        "teacher": find_teacher(config).identity,
        **({} if precision == "float32" else {"precision": precision}),
        "feature_extractor": {"name": extractor.name, "weights_sha256": extractor.sha256},
        "reference": settings.reference,
        "num_samples": settings.num_samples,
        "seed": settings.seed,
        "metrics": [m for m in settings.metrics if m != "trajectory_error"],
        "guidance_scale": config.trajectories.guidance_scale,
        "clip_denoised": config.trajectories.clip_denoised,
    }


def stored_teacher_rows(config: Config, storage: Storage, spec: dict[str, Any]) -> dict[str, Any]:
    """Rows measured before with an equal spec: in storage, or shipped with the teacher."""
    found: dict[str, Any] = {}
    shipped = Path(package_path(teacher_path(config))) / SHIPPED_ROWS
    if shipped.is_file():
        content = json.loads(shipped.read_text())
        found |= content["rows"] if content["spec"] == spec else {}
    with contextlib.suppress(MissingObject):
        found |= json.loads(storage.read(_rows_key(spec)))["rows"]
    return found


def store_teacher_rows(storage: Storage, spec: dict[str, Any], rows: dict[str, Any]) -> None:
    """Keep the teacher's rows: they cost more than the student's and do not change."""
    content = {"spec": spec, "rows": rows, "versions": software_versions()}
    storage.write(_rows_key(spec), (json.dumps(content, indent=2) + "\n").encode())


def _rows_key(spec: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return f"evaluation/teachers/{digest}.json"


def load_reference(config: Config, extractor: Extractor) -> Reference:
    """Statistics of the real data: the training images of `data.name`, or `mu` and `sigma` of an .npz file."""
    settings = config.evaluation
    if settings.reference == "data":
        moments = moments_of(extractor(to_uint8(load_digits()[0].images))["features"].numpy())
        return Reference(moments.mean, moments.covariance, moments.count)
    file = Path(settings.reference)
    if not file.is_file():
        raise UserError(
            f"evaluation.reference: {file} is missing; put an .npz with mu and sigma of the real data there"
        )
    try:
        with np.load(file, allow_pickle=False) as found:
            mean, covariance = found["mu"].astype(np.float64), found["sigma"].astype(np.float64)
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError) as error:
        raise UserError(f"evaluation.reference: {file} is not an .npz with mu and sigma: {error}") from None
    width = extractor(
        torch.zeros(1, config.network.channels, *[config.network.image_size] * 2, dtype=torch.uint8)
    )["features"].shape[1]
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise UserError(
            f"evaluation.reference: {file} has mu of {mean.shape}, {extractor.name} gives {width} features"
        )
    return Reference(mean, covariance, None)


def held_out_row(config: Config, extractor: Extractor, reference: Reference) -> dict[str, Any] | None:
    """Real images that the teacher never saw, by the same measure: what a perfect sampler of as many would get."""
    if config.data.name is None:
        return None
    held_out = load_digits()[1]
    found = extractor(to_uint8(held_out.images))
    moments = moments_of(found["features"].numpy())
    row = {"num_samples": moments.count, "fid": distance_to(moments, reference)}
    if "agreement" in config.evaluation.metrics:
        row["agreement"] = int((found["logits"].argmax(1) == held_out.labels).sum()) / moments.count
    return row


def distance_to(moments: Moments, reference: Reference) -> float:
    return frechet_distance(moments.mean, moments.covariance, reference.mean, reference.covariance)


def make_row(
    source: Source, config: Config, blocks: Iterable[BlockResult], reference: Reference
) -> dict[str, Any]:
    """A line of the table from the blocks of a source, in sample order."""
    blocks = list(blocks)
    row: dict[str, Any] = {"source": source.title}
    if source.kind == "teacher":
        row["evaluations"] = evaluations_of(source, config)
    if "fid" in config.evaluation.metrics:
        row["fid"] = distance_to(merge(b.moments for b in blocks), reference)
    if "agreement" in config.evaluation.metrics:
        row["agreement"] = sum(b.agreeing for b in blocks) / config.evaluation.num_samples
    return row


def _run_blocks(
    config: Config, make_actor: Any, sources: list[Source], cluster: RayCluster
) -> dict[Block, Any]:
    blocks = [b for source in sources for b in blocks_of(config, source)]
    if "trajectory_error" in config.evaluation.metrics:
        blocks += trajectory_blocks(config)
    # the dearest first, so that no actor is left alone with a long one at the end
    blocks.sort(key=lambda b: -b.source.steps)
    results: dict[Block, Any] = {}
    with console.progress("evaluating", sum(b.stop - b.start for b in blocks), "samples") as advance:
        pool = run_pool(make_actor, lambda actor, block: actor.run.remote(block), blocks, cluster.capacity)
        for block, result in pool:
            results[block] = result
            advance(block.stop - block.start)
    return results


class EvaluationActor:
    """A Ray actor that holds student, teacher and extractor."""

    def __init__(self, config: Config, student_path: str) -> None:
        torch.set_num_threads(config.evaluation.threads)
        endpoint = config.storage.endpoint_url
        self.config = config
        self.storage = open_storage(config.storage.root, endpoint)
        ema = config.evaluation.ema_decay
        self.student_meta = read_meta(student_path, endpoint, ema)
        self.device = compute_device()
        half, compiled = config.evaluation.precision, config.evaluation.compile
        student = load_student(student_path, endpoint, ema=ema, precision=half, compile=compiled)
        self.student = student.to(self.device)
        self.teacher = open_teacher(config).to(self.device)
        settings = config.evaluation
        self.extractor = load_extractor(
            settings.feature_extractor, settings.weights_path, settings.weights_sha256
        )

    def run(self, block: Block) -> Any:
        return self._moments(block) if block.work == "moments" else self._trajectory_error(block)

    def _inputs(self, indices: range) -> tuple[Tensor, Tensor | None]:
        seed, classes = self.config.evaluation.seed, self.student.network.num_classes
        noise = sample_noise(seed, indices, self.teacher.shape).to(self.device)
        return noise, sample_labels(seed, indices, classes).to(self.device) if classes else None

    def _moments(self, block: Block) -> BlockResult:
        noise, labels = self._inputs(range(block.start, block.stop))
        if block.source.kind == "student":
            images = self.student.sample(noise, labels)
        else:
            settings = self.config.trajectories
            args = (noise, block.source.times, block.source.solver, block.source.steps, labels)
            rest = (settings.guidance_scale, settings.clip_denoised, block.source.grid)
            images = solve(self.teacher, *args, *rest)[:, -1]
        pictures = to_uint8(images).cpu()
        found = self.extractor(pictures)
        agreeing = 0
        if labels is not None and "logits" in found:
            agreeing = int((found["logits"].argmax(1) == labels.cpu()).sum())
        shard = None
        if self.config.evaluation.keep_samples and block.source.kind == "student":
            tensors = {"images": pictures} | ({} if labels is None else {"labels": labels})
            folder = samples_folder(self.config, self.student_meta)
            shard = write_shard(
                self.storage, folder, block.start // self.config.evaluation.batch_size, block.start, tensors
            )
        return BlockResult(moments_of(found["features"].numpy()), agreeing, shard)

    def _trajectory_error(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Sums over held-out samples of squared differences and squares, each (M,) float64."""
        indices = range(block.start, block.stop)
        target, _ = solve_batch(self.config, self.teacher, self.config.evaluation.seed, indices)
        noise, labels = self._inputs(indices)
        difference = self.student.trajectory(noise, labels, self.config.trajectories.time_points) - target
        sums = [x.double().square().sum(dim=(0, 2, 3, 4)).cpu().numpy() for x in (difference, target)]
        return sums[0], sums[1]

    def measure_cost(self, pairs: int = 5) -> dict[str, float]:
        """What one student sample costs in teacher evaluations: the median ratio of pairs run in turn."""
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
