"""eval: Ray actors draw or read images and extract features; the driver merges and compares.

Every figure is a function of checkpoint, seeds, counts and weights: blocks are merged in a tree over their numbers, so
the number of actors changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from dsno_cluster import console
from dsno_cluster.cluster.ray_pool import actor_count
from dsno_cluster.config import Config
from dsno_cluster.diffusion.schedule import same_times
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation import pictures
from dsno_cluster.evaluation.actor import STUDENT, Source
from dsno_cluster.evaluation.features import Reading, WeightsFile, check_shape, find_all_weights, readings
from dsno_cluster.evaluation.image_sets import open_images
from dsno_cluster.evaluation.measure import ImagesOf, measure
from dsno_cluster.evaluation.metrics import OF_REFERENCE, Collected, Reference, check_count, fewest, figures
from dsno_cluster.evaluation.reference import (
    check_reference_is_there,
    compared_data,
    find_real_data,
    warnings_of,
)
from dsno_cluster.evaluation.sample_shards import SampleSpec, sample_spec
from dsno_cluster.evaluation.teacher_rows import (
    as_trajectories,
    comparison_spec,
    evaluations_of,
    row_key,
    store_teacher_rows,
    stored_teacher_rows,
    teacher_sources,
)
from dsno_cluster.model_folder import ModelMeta, model_address, read_meta
from dsno_cluster.provenance import code_version, software_versions
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import MissingObject, Storage, open_storage
from dsno_cluster.students.dsno import student_model
from dsno_cluster.teachers import find_teacher
from dsno_cluster.trajectories.shards import commit_manifest, make_manifest, read_manifest

HELD_OUT = Source("images", address="held-out")


def find_student(config: Config, student_path: str | None) -> tuple[str, ModelMeta]:
    """Address and `meta.json` of the student to evaluate: the one at `student_path`, or the config's newest.

    The address is that of one step: a training that goes on moves `latest`. Raises UserError where there is none, where it
    is not of the config's network, where it was trained on the noise of the evaluation, or where there is no teacher.
    """
    endpoint = config.storage.endpoint_url
    try:
        path = model_address(student_path or config.student_address, endpoint)
        meta = read_meta(path, endpoint, config.evaluation.ema_decay)
    except UserError as error:
        how = (
            "name one that is there"
            if student_path
            else "`dsno-cluster train` makes it; --student names another"
        )
        raise UserError(f"{error}; {how}") from None
    student = student_model(meta, path)
    if student.network != config.network:
        raise UserError(
            f"network: not that of the student at {path}; pass the config that it was trained with"
        )
    if not same_times(student.times, config.trajectories.time_points):
        raise UserError(
            f"trajectories.times: the student at {path} answers {list(student.times)}, "
            f"the config asks for {list(config.trajectories.time_points)}"
        )
    if meta.seed == config.evaluation.seed:
        raise UserError(
            f"evaluation.seed {config.evaluation.seed}: the student at {path} was trained on the noise of that seed; "
            "take another"
        )
    find_teacher(config)
    return path, meta


def check_comparison(config: Config) -> None:
    """Raises UserError where there is no reference, or none of what the metrics need, and WorkError where there are no weights.

    Published weights are downloaded here, as the nodes of a cluster may have no way out.
    """
    settings = config.evaluation
    read, weights = readings(settings), _find_weights(config)
    compared = {metric: reading for metric, reading in read.items() if metric in OF_REFERENCE}
    _check_sampled(config, weights)
    compared_data(config, compared, weights)


def _find_weights(config: Config) -> dict[str, WeightsFile]:
    """The weights of the config's metrics; a reference that is not there is told before any are downloaded for it."""
    check_reference_is_there(config)
    return find_all_weights(config.evaluation)


def _check_sampled(config: Config, weights: dict[str, WeightsFile]) -> None:
    """Raises UserError where the metrics cannot be of this network's samples."""
    check_shape(weights, config.network.image_shape, "the samples")
    if "agreement" in config.evaluation.metrics and not config.network.num_classes:
        raise UserError("evaluation.metrics: agreement is of classes, and network.num_classes is 0")


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
    settings, began = config.evaluation, time.monotonic()
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    path, student_meta = find_student(config, student_path)
    keep = samples_folder(config, student_meta) if settings.keep_samples else None
    samples_spec = _samples_spec(config, student_meta)
    if keep is not None:
        _check_kept(storage, keep, samples_spec)
    read, weights = readings(settings), _find_weights(config)
    _check_sampled(config, weights)
    real = find_real_data(config, storage, read, weights)
    spec = comparison_spec(config, read, weights, real)
    stored = stored_teacher_rows(config, storage, spec)
    # with no metric of images there is nothing to draw the teacher's for
    of_teacher = teacher_sources(config) if read else []
    missing = [source for source in of_teacher if row_key(source) not in stored]
    what = (
        f"{settings.num_samples} samples of {path} against {real.count or 'the'} real images by {', '.join(weights)}"
        if read
        else f"{settings.trajectory_samples} trajectories of {path} against the teacher's"
    )
    console.say(f"{what}, {actor_count(actors, settings.threads)}{_known_rows(of_teacher, stored)}")
    folder = folder or f"evaluation/{config.name}/"
    _say_replaced(storage, folder, student_meta.step, settings.num_samples)
    sets = [ImagesOf(source, settings.num_samples, read) for source in missing]
    if read or keep is not None:
        sets.append(ImagesOf(STUDENT, settings.num_samples, read))
    if config.data.name is not None and read:
        count = open_images(HELD_OUT.address).count
        sets.append(ImagesOf(HELD_OUT, count, _for_held_out(config, read, count)))
    student: dict[str, Any] = {"source": STUDENT.title}
    held_out: dict[str, Any] | None = None

    def finish(images: ImagesOf, collected: Collected, reference: Reference | None) -> None:
        nonlocal held_out
        found = figures(settings, images.read, collected, reference)
        if images.source is STUDENT:
            student.update(found)
        elif images.source is HELD_OUT:  # what a perfect sampler of as many would get
            held_out = {"num_samples": images.count} | found
        else:  # kept at once: an evaluation that is started again goes on with the others
            row = {"source": images.source.title, "evaluations": evaluations_of(images.source, config)}
            stored[row_key(images.source)] = row | found
            store_teacher_rows(storage, spec, stored)

    measured = measure(
        config,
        weights,
        sets,
        real,
        finish,
        student=(path, student_meta.sha256),
        keep=keep,
        actors=actors,
        ray_address=ray_address,
        title=_title(student_meta),
        reached=(len(of_teacher) - len(missing)) * settings.num_samples,
    )
    reference = measured.reference
    student |= measured.cost
    if "trajectory_error" in settings.metrics:
        times = map(str, config.trajectories.time_points)
        student["trajectory_error"] = dict(zip(times, measured.trajectory_error, strict=True))
    assert measured.environment is not None and measured.pictured is not None  # there is a student
    if keep is not None:
        manifest = make_manifest(samples_spec, measured.shards, measured.environment)
        commit_manifest(storage, keep, manifest)
    made_by = as_trajectories(config)  # asks for the teacher, perhaps of S3: once
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
            "step": student_meta.step,
            "ema_decay": student_meta.ema_decay,
            "sha256": student_meta.sha256,
        },
        "teacher": find_teacher(config).info.identity.model_dump(mode="json"),
        "precision": settings.precision,
        "real_held_out": held_out,
        "teacher_rows": [
            {**stored[row_key(source)], "as_trajectories": source == made_by} for source in of_teacher
        ],
        "student": student,
        "device": measured.environment.device,
        "seconds": round(time.monotonic() - began, 1),
        "train_seconds": student_meta.train_seconds,
    }
    metrics["pictures"] = pictures.layout(config)
    storage.write(folder + "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    drawn = pictures.pictures(config, measured.pictured, metrics)
    for name, png in drawn.items():
        storage.write(folder + name, png)
    console.say(f"written: {storage.url}/{folder}{{{', '.join(['metrics.json', *drawn])}}}")
    return metrics


def _known_rows(of_teacher: list[Source], stored: dict[str, Any]) -> str:
    """How many of the teacher's rows need not be measured, for the line that says what will be done."""
    if not of_teacher:
        return ""
    known = [stored[row_key(source)] for source in of_teacher if row_key(source) in stored]
    shipped = sum("shipped" in row for row in known)
    came = f", {shipped} of them where the teacher was made: they came with it" if shipped else ""
    return f"; {len(known)} of the teacher's {len(of_teacher)} rows were measured before{came}"


def _say_replaced(storage: Storage, folder: str, step: int | None, num_samples: int) -> None:
    """Tell where an evaluation of another student, or otherwise set, will be overwritten."""
    with contextlib.suppress(MissingObject, ValueError):
        before = json.loads(storage.read(folder + "metrics.json"))
        old = before["checkpoint"].get("step"), before["num_samples"]
        if old != (step, num_samples):
            console.say(
                f"at its end this replaces the evaluation of step {old[0]} by {old[1]} samples; to keep that, copy "
                f"{storage.url}/{folder} first"
            )


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
    read = {
        metric: reading
        for metric, reading in readings(settings).items()
        if metric != "agreement" or images.labels is not None
    }
    if not read:
        raise UserError(f"evaluation.metrics: none of {', '.join(settings.metrics)} is one of images alone")
    weights = _find_weights(config)
    check_count(settings, read, images.count, address)
    check_shape(weights, images.shape, address)
    real = find_real_data(config, storage, read, weights)
    console.say(
        f"{images.count} images of {address} against {real.count or 'the'} real images by {', '.join(weights)}, "
        f"{actor_count(actors, settings.threads)}"
    )
    sets = [ImagesOf(Source("images", address=images.address), images.count, read)]
    found: dict[str, float] = {}

    def finish(images: ImagesOf, collected: Collected, reference: Reference | None) -> None:
        found.update(figures(settings, images.read, collected, reference))

    measured = measure(config, weights, sets, real, finish, actors=actors, ray_address=ray_address)
    metrics = {
        "name": config.name,
        "samples": {"address": address, **images.identity},
        "num_samples": images.count,
        **_provenance(config, weights, measured.reference, images.shape[1], read, images.count),
        "seeds": {"metrics": settings.metric_seed},
        "figures": found,
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
        "warnings": warnings_of(read, weights, reference, count, resolution) if reference else [],
        "versions": software_versions(),
        "code": code_version().model_dump(exclude_none=True),
    }


def _title(student_meta: ModelMeta) -> str:
    """What an evaluation's progress is called: of a job started again it tells whether it came to another checkpoint."""
    decay = student_meta.ema_decay
    return f"evaluating step {student_meta.step}" + (f", average {decay:g}" if decay else "")


def _samples_spec(config: Config, student_meta: ModelMeta) -> SampleSpec:
    settings = config.evaluation
    return SampleSpec(
        student=student_meta.sha256,
        seed=settings.seed,
        samples_per_shard=settings.batch_size,
        threads=settings.threads,
        precision=settings.precision,
        compile=settings.compile,
    )


def _check_kept(storage: Storage, folder: str, spec: SampleSpec) -> None:
    """UserError where samples are kept already that were made another way."""
    kept = read_manifest(storage, folder)
    if kept is not None and sample_spec(kept[0]) != spec:
        raise UserError(
            f"{storage.url}/{folder}: holds samples of another evaluation.batch_size, threads, precision or compile; "
            "go back to those, or delete that folder"
        )


def samples_folder(config: Config, student_meta: ModelMeta) -> str:
    return f"samples/{student_meta.sha256[:16]}-{config.evaluation.seed}/"


def _for_held_out(config: Config, read: dict[str, Reading], count: int) -> dict[str, Reading]:
    """The metrics that as few real images as are held out can be measured by."""
    needed = fewest(config.evaluation)
    return {metric: reading for metric, reading in read.items() if needed.get(metric, 0) <= count}
