"""eval: Ray actors draw or read images and extract features; the driver merges and compares.

Every figure is a function of checkpoint, seeds, counts and weights: blocks are merged in a tree over their numbers, so
the number of actors changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsno_cluster import console
from dsno_cluster.cluster.ray_pool import (
    RayCluster,
    actor_count,
    given_address,
    import_ray,
    open_ray,
    run_pool,
)
from dsno_cluster.config import Config, with_absolute_paths
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation import pictures
from dsno_cluster.evaluation.actor import STUDENT, Block, EvaluationActor, Source
from dsno_cluster.evaluation.features import BATCH, Reading, WeightsFile, find_all_weights, readings
from dsno_cluster.evaluation.image_sets import open_images
from dsno_cluster.evaluation.metrics import Collected, Reference, figures
from dsno_cluster.evaluation.reference import RealData, find_real_data, finished_reference, warnings_of
from dsno_cluster.evaluation.teacher_rows import (
    comparison_spec,
    evaluations_of,
    row_key,
    store_teacher_rows,
    stored_teacher_rows,
    teacher_sources,
)
from dsno_cluster.models.dsno import KIND as STUDENT_KIND
from dsno_cluster.models.dsno import load_student
from dsno_cluster.models.weights import read_meta, software_versions
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.trajectories.generate import environment
from dsno_cluster.trajectories.plan import find_teacher
from dsno_cluster.trajectories.shards import Manifest, Shard, canonical_hash, commit_manifest, read_manifest

HELD_OUT = Source("images", address="held-out")


@dataclass(frozen=True)
class Measured:
    """What the pool gave: samples by source, the student's trajectory error by time point, kept shards, its cost and on what."""

    collected: dict[Source, Collected]
    trajectory_error: list[float]
    shards: list[Shard]
    cost: dict[str, float]
    device: str | None


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
    config: Config,
    student_path: str | None,
    actors: int | None = None,
    ray_address: str | None = None,
    folder: str | None = None,
) -> dict[str, Any]:
    """Evaluate the newest student of the config (or the one at `student_path`) against the real data.

    By `actors` Ray actors (None: as many as there is room for), on this machine or on the Ray at `ray_address`.

    Writes metrics.json and the pictures below `folder` of the storage (default: `evaluation/<name>/`); returns the metrics.
    Raises UserError where there is no student, no teacher, no weights or no reference.
    """
    settings = config.evaluation
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    path, student_meta = find_student(config, student_path)
    keep = samples_folder(config, student_meta) if settings.keep_samples else None
    samples_spec = _samples_spec(config, student_meta)
    if keep is not None:
        _check_kept(storage, keep, samples_spec)
    read, weights = readings(settings), find_all_weights(settings)
    real = find_real_data(config, storage, read, weights)
    spec = comparison_spec(config, read, weights, real)
    stored = stored_teacher_rows(config, storage, spec)
    sources = [STUDENT, *teacher_sources(config)]
    missing = [s for s in sources if s is STUDENT or row_key(s) not in stored]
    console.say(
        f"{settings.num_samples} samples of {path} against {real.count or 'the'} real images by "
        f"{', '.join(weights) or 'no extractor'}, {actor_count(actors, settings.threads)}; "
        f"{len(sources) - len(missing)} of the teacher's {len(sources) - 1} rows are stored"
    )
    counts = dict.fromkeys(missing, settings.num_samples)
    by_source = dict.fromkeys(missing, read)
    if config.data.name is not None and read:
        counts[HELD_OUT] = open_images(HELD_OUT.address).count
        by_source[HELD_OUT] = _for_held_out(config, read, counts[HELD_OUT])
    measured = _measure(config, weights, counts, by_source, real, path, keep, actors, ray_address)
    reference = finished_reference(storage, real, measured.collected)

    def row(source: Source) -> dict[str, Any]:
        collected = measured.collected[source]
        of_teacher = {"evaluations": evaluations_of(source, config)} if source.kind == "teacher" else {}
        return {"source": source.title} | of_teacher | figures(settings, read, collected, reference)

    teacher_rows = {**stored, **{row_key(s): row(s) for s in missing if s is not STUDENT}}
    store_teacher_rows(storage, spec, teacher_rows)
    student = row(STUDENT) | measured.cost
    if "trajectory_error" in settings.metrics:
        times = map(str, config.trajectories.time_points)
        student["trajectory_error"] = dict(zip(times, measured.trajectory_error, strict=True))
    if keep is not None:
        manifest = Manifest(samples_spec, tuple(measured.shards), environment())
        commit_manifest(storage, keep, manifest)
    metrics = {
        "name": config.name,
        "num_samples": settings.num_samples,
        **_provenance(config, weights, reference, config.network.image_size, read, settings.num_samples),
        "seeds": {
            "noise": settings.seed,
            "trajectories": config.seed,
            "metrics": settings.metric_seed,
        },
        "checkpoint": {
            "path": path,
            "step": student_meta.get("step"),
            "ema_decay": student_meta.get("ema_decay"),
            "sha256": student_meta["sha256"],
        },
        "teacher": find_teacher(config).identity,
        "precision": settings.precision,
        "real_held_out": _held_out_row(config, by_source, measured, reference),
        "teacher_rows": [teacher_rows[row_key(s)] for s in sources[1:]],
        "student": student,
        "device": measured.device,
        "train_seconds": student_meta.get("train_seconds"),
    }
    metrics["pictures"] = pictures.layout(config)
    folder = folder or f"evaluation/{config.name}/"
    storage.write(folder + "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    student_here = load_student(path, config.storage.endpoint_url, ema=settings.ema_decay)
    drawn = pictures.pictures(config, student_here, metrics)
    for name, png in drawn.items():
        storage.write(folder + name, png)
    console.say(f"written: {storage.url}/{folder}{{{', '.join(['metrics.json', *drawn])}}}")
    return metrics


def evaluate_images(
    config: Config, address: str, actors: int | None = None, ray_address: str | None = None
) -> dict[str, Any]:
    """Measure the images at `address` (see `image_sets`) by the config's metrics; nothing is sampled.

    Writes `<storage.root>/evaluation/<name>/samples-<hash of the images>.json`; returns its content. Raises UserError
    where there are no images, weights or reference.
    """
    settings = config.evaluation
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    images = open_images(address, config.storage.endpoint_url)
    read = {metric: reading for metric, reading in readings(settings).items() if metric != "agreement"}
    if not read:
        raise UserError(f"evaluation.metrics: none of {', '.join(settings.metrics)} is one of images alone")
    weights = find_all_weights(settings)
    real = find_real_data(config, storage, read, weights)
    console.say(
        f"{images.count} images of {address} against {real.count or 'the'} real images by {', '.join(weights)}, "
        f"{actor_count(actors, settings.threads)}"
    )
    source = Source("images", address=address)
    measured = _measure(
        config, weights, {source: images.count}, {source: read}, real, None, None, actors, ray_address
    )
    reference = finished_reference(storage, real, measured.collected)
    metrics = {
        "name": config.name,
        "samples": {"address": address, **images.identity},
        "num_samples": images.count,
        **_provenance(config, weights, reference, images.shape[1], read, images.count),
        "seeds": {"metrics": settings.metric_seed},
        "figures": figures(settings, read, measured.collected[source], reference),
    }
    key = f"evaluation/{config.name}/samples-{canonical_hash(images.identity)}.json"
    storage.write(key, (json.dumps(metrics, indent=2) + "\n").encode())
    console.say(f"written: {storage.url}/{key}")
    return metrics


def _provenance(
    config: Config,
    weights: dict[str, WeightsFile],
    reference: Reference | None,
    resolution: int,
    read: dict[str, Reading],
    count: int,
) -> dict[str, Any]:
    """What stands beside every figure: the reference, the extractors, versions, and what to beware of."""
    settings = config.evaluation
    extractors = {name: file.sha256 for name, file in weights.items()}
    main = settings.feature_extractor
    return {
        "reference": {
            "what": settings.reference,
            "count": reference.count if reference else None,
            "resolution": reference.resolution if reference else None,
            "identity": reference.identity if reference else None,
        },
        "feature_extractor": {"name": main, "weights_sha256": extractors.get(main)},
        "other_extractors": {name: sha256 for name, sha256 in extractors.items() if name != main},
        "warnings": warnings_of(settings, read, weights, reference, count, resolution) if reference else [],
        "versions": software_versions(),
    }


def _samples_spec(config: Config, student_meta: dict[str, Any]) -> dict[str, Any]:
    settings = config.evaluation
    return {
        "student": student_meta["sha256"],
        "seed": settings.seed,
        "samples_per_shard": settings.batch_size,
        "threads": settings.threads,
        "precision": settings.precision,
        "compile": settings.compile,
    }


def _check_kept(storage: Storage, folder: str, spec: dict[str, Any]) -> None:
    """UserError where samples are kept already that were made another way."""
    kept = read_manifest(storage, folder)
    if kept is not None and kept[0].spec != spec:
        raise UserError(
            f"{storage.url}/{folder}: holds samples of another evaluation.batch_size, threads, precision or compile; "
            "go back to those, or delete that folder"
        )


def samples_folder(config: Config, student_meta: dict[str, Any]) -> str:
    return f"samples/{student_meta['sha256'][:16]}-{config.evaluation.seed}/"


def _for_held_out(config: Config, read: dict[str, Reading], count: int) -> dict[str, Reading]:
    """The metrics that as few real images as are held out can be measured by."""
    settings = config.evaluation
    enough = {
        "kid": settings.kid_subset_size <= count,
        "inception_score": settings.inception_splits <= count,
        "precision_recall": settings.neighborhood < count,
    }
    return {metric: reading for metric, reading in read.items() if enough.get(metric, True)}


def _held_out_row(
    config: Config,
    by_source: dict[Source, dict[str, Reading]],
    measured: Measured,
    reference: Reference | None,
) -> dict[str, Any] | None:
    """Real images that the teacher never saw, by the same measure: what a perfect sampler of as many would get."""
    if HELD_OUT not in by_source:
        return None
    collected = measured.collected[HELD_OUT]
    found = figures(config.evaluation, by_source[HELD_OUT], collected, reference)
    return {"num_samples": collected.count} | found


def _block_size(source: Source, batch_size: int) -> int:
    """Images of a block. Those that are there already are extracted in the batches that torch-fidelity makes of them, so
    that features are the same to the last bit however they are split."""
    return -(-batch_size // BATCH) * BATCH if source.kind == "images" else batch_size


def _blocks(work: str, source: Source, count: int, size: int) -> list[Block]:
    return [Block(work, source, start, min(start + size, count)) for start in range(0, count, size)]


def _measure(
    config: Config,
    weights: dict[str, WeightsFile],
    counts: dict[Source, int],
    read: dict[Source, dict[str, Reading]],
    real: RealData,
    student_path: str | None,
    keep: str | None,
    actors: int | None,
    ray_address: str | None,
) -> Measured:
    """Have the actors measure `counts[source]` images of each source, by `read[source]`, and the reference's."""
    settings = config.evaluation
    if real.source is not None:
        assert real.images is not None
        counts = counts | {real.source: real.images.count}
        read = read | {real.source: real.read}
    sizes = {source: _block_size(source, settings.batch_size) for source in counts}
    blocks = [b for source in counts for b in _blocks("features", source, counts[source], sizes[source])]
    if student_path is not None and "trajectory_error" in settings.metrics:
        blocks += _blocks("trajectory", STUDENT, settings.trajectory_samples, settings.batch_size)
    # the dearest first, so that no actor is left alone with a long one at the end
    blocks.sort(key=lambda b: -b.source.steps)
    collected = {source: Collected(count, sizes[source]) for source, count in counts.items()}
    errors: dict[Block, tuple[np.ndarray, np.ndarray]] = {}
    shards: dict[int, Shard] = {}
    there = with_absolute_paths(config)
    with open_ray(given_address(ray_address), actors, settings.threads) as cluster:
        # two calls at a time: while one block's features are extracted the next is drawn or read
        remote = import_ray().remote(max_concurrency=2, **cluster.actor_options())(EvaluationActor)

        def make_actor() -> Any:
            return remote.remote(there, weights, read, student_path, keep)

        idle: list[Any] = []
        for block, result in _run_blocks(make_actor, blocks, cluster, idle):
            if block.work == "trajectory":
                errors[block] = result
                continue
            found, shard = result
            collected[block.source].add(block.start, found)
            if shard is not None:
                shards[block.start] = shard
        cost, device = {}, None
        if student_path is not None:
            probe = idle[0]  # alone now, so that nothing disturbs the timing
            cost, device = import_ray().get([probe.measure_cost.remote(), probe.device_name.remote()])
    parts = [errors[block] for block in sorted(errors, key=lambda b: b.start)]
    error = np.sqrt(sum(p[0] for p in parts) / sum(p[1] for p in parts)).tolist() if parts else []
    return Measured(collected, error, [shards[start] for start in sorted(shards)], cost, device)


def _run_blocks(
    make_actor: Callable[[], Any], blocks: list[Block], cluster: RayCluster, idle: list[Any]
) -> Iterator[tuple[Block, Any]]:
    """Pairs of a block and its result, as they come. One actor stays, in `idle`, for what comes after them."""

    def release(actor: Any) -> None:
        if idle:
            import_ray().kill(actor)
        else:
            idle.append(actor)

    with console.progress("evaluating", sum(b.stop - b.start for b in blocks), "samples") as advance:
        pool = run_pool(
            make_actor,
            lambda actor, block: actor.run.remote(block),
            blocks,
            cluster.capacity,
            in_flight=2,
            release=release,
        )
        for block, result in pool:
            yield block, result
            advance(block.stop - block.start)
