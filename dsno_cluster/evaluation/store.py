"""The last step of an evaluation: it writes the figures, and what they depend on, to files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict

from dsno_cluster import console
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.evaluation import pictures
from dsno_cluster.evaluation.comparable import (
    decoder_of,
    extractor_of,
    other_extractors_of,
    setting_differences,
)
from dsno_cluster.evaluation.look_up import Comparison, ImagesComparison, KeptSamples
from dsno_cluster.evaluation.measure import MeasuredStudent, Surroundings
from dsno_cluster.evaluation.nearest_picture import NEAREST, nearest_picture, shown_samples
from dsno_cluster.evaluation.records import (
    Checkpoint,
    ExtractorName,
    Figures,
    HeldOut,
    ImagesMetrics,
    MeasuredImages,
    Metrics,
    ReferenceFacts,
    Seeds,
    StudentRow,
    TeacherRow,
    read_file,
)
from dsno_cluster.evaluation.reference import warnings_of
from dsno_cluster.evaluation.student_before import FoundBefore
from dsno_cluster.features.extractors import Readings, WeightsFile
from dsno_cluster.provenance import Code, Environment, code_version
from dsno_cluster.records import Values, canonical_hash, record_bytes
from dsno_cluster.storage import Stat, Storage, only_writer
from dsno_cluster.teachers import Sampling
from dsno_cluster.trajectories.shards import Shard, commit_manifest, make_manifest

METRICS = "metrics.json"
WRITING = "writing.json"  # the record of the evaluation that writes its files now


@dataclass(frozen=True)
class Findings:
    """The figures of a comparison: the teacher's rows, the student, held-out real images."""

    rows: Mapping[Sampling, TeacherRow]
    student: MeasuredStudent
    of_student: Figures
    held_out: HeldOut | None
    surroundings: Surroundings


def store(
    comparison: Comparison,
    found: Findings,
    began: float,
    replaced: Stat | None,
    before: FoundBefore = FoundBefore(),  # noqa: B008 (frozen)
) -> Metrics:
    """Write the pictures and then metrics.json, and commit the kept samples.

    Of several evaluations that end at once, each writes all its files before the next; the last remains. `began`
    is the start, by `time.monotonic`, `replaced` was metrics.json then, and `before` is the student before finishing.
    """
    config, storage, folder = comparison.config, comparison.storage, comparison.folder
    made_by = found.surroundings.environment
    if comparison.keep is not None:
        _commit_samples(storage, comparison.keep, found.student.shards, made_by)
    nearest, not_nearest = _nearest_picture(comparison, found)
    student, teacher, settings = comparison.subject.student, comparison.subject.teacher, config.evaluation
    beside = _beside(comparison, found.surroundings, comparison.states.image_shape[1], settings.num_samples)
    beside["warnings"] += (
        *found.student.warnings,
        *_trained_on(comparison),
        *not_nearest,
        *([before.warning] if before.warning else []),
    )
    metrics = Metrics(
        **beside,
        seeds=Seeds(noise=settings.seed, trajectories=config.seed, metrics=settings.metric_seed),
        draws=settings.draws,
        checkpoint=_checkpoint(comparison),
        teacher=teacher.info.identity.model_dump(mode="json"),
        decoder=decoder_of(comparison),
        precision=settings.precision,
        real_held_out=found.held_out,
        teacher_rows=tuple(
            found.rows[sampling].model_copy(update={"as_trajectories": sampling.as_trajectories})
            for sampling in comparison.samplings
        ),
        student=_student_row(comparison, found),
        before=before.row,
        device=made_by.device,
        seconds=round(time.monotonic() - began, 1),
        train_seconds=student.train_seconds,
        pictures=pictures.layout(config, comparison.states) if found.student.pictured else None,
    )
    pictured = found.student.pictured
    files = pictures.pictures(config, pictured, metrics, comparison.states) if pictured else {}
    files |= nearest
    with only_writer(storage, folder + WRITING):
        if storage.stat(folder + METRICS) not in (replaced, None):
            console.say(f"this replaces an evaluation that ended meanwhile: {storage.url}/{folder}{METRICS}")
        for name, png in files.items():
            storage.write(folder + name, png)
        for name in {*pictures.NAMES, NEAREST} - files.keys():  # an earlier evaluation's, of other figures
            storage.delete(folder + name)
        storage.write(folder + METRICS, record_bytes(metrics))
    console.say(f"written: {storage.url}/{folder}{{{', '.join([METRICS, *files])}}}")
    return metrics


def _nearest_picture(comparison: Comparison, found: Findings) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """nearest.png by its name, if the metric was measured and samples are pictured, and a warning if it could not be made."""
    pictured, reference, images = found.student.pictured, found.surroundings.reference, comparison.real.images
    if pictured is None or pictured.features is None or reference is None or images is None:
        return {}, ()
    plain = pictures.layout(comparison.config, comparison.states)
    training = reference.features[comparison.readings["nearest"].key]
    shown = shown_samples(plain, pictured.ours)
    try:
        png = nearest_picture(plain, shown, pictured.features, images, training, found.held_out)
    except (UserError, WorkError) as error:  # the figures, which may have taken hours, are whole without it
        return {}, (f"the picture of nearest training images could not be made: {error}",)
    return {NEAREST: png}, ()


def _commit_samples(
    storage: Storage, keep: KeptSamples, shards: tuple[Shard, ...], made_by: Environment
) -> None:
    """Write the manifest of the kept samples, unless some have vanished since they were drawn."""
    sizes = {stat.key: stat.size for stat in storage.list(f"{keep.folder}shard-")}
    if gone := [shard.key for shard in shards if sizes.get(keep.folder + shard.key) != shard.size]:
        console.say(
            f"note: {storage.url}/{keep.folder} gets no manifest: {len(gone)} of its shards have vanished since they were drawn, "
            f"for example {gone[0]}; the figures are whole, and the same command draws the samples again"
        )
        return
    commit_manifest(storage, keep.folder, make_manifest(keep.spec, shards, made_by))


def store_images(comparison: ImagesComparison, figures: Figures, surroundings: Surroundings) -> ImagesMetrics:
    """Write `evaluation/<name>/samples-<hash of the images>.json`."""
    images, settings, storage = comparison.images, comparison.config.evaluation, comparison.storage
    identity: Values = images.identity.model_dump(mode="json")
    metrics = ImagesMetrics(
        **_beside(comparison, surroundings, images.shape[1], images.count),
        samples=MeasuredImages.model_validate({"address": comparison.address, **identity}),
        seeds=Seeds(metrics=settings.metric_seed),
        figures=figures,
    )
    key = f"evaluation/{comparison.config.name}/samples-{canonical_hash(identity)}.json"
    storage.write(key, record_bytes(metrics))
    console.say(f"written: {storage.url}/{key}")
    return metrics


def say_replaced(comparison: Comparison) -> Stat | None:
    """Say that an evaluation of another student, or with other settings, will be overwritten; returns its metrics.json."""
    storage, folder = comparison.storage, comparison.folder
    there = storage.stat(folder + METRICS)
    try:
        before = read_file(Metrics, storage, folder + METRICS)
    except UserError as error:
        console.say(f"at its end this replaces a file that cannot be read: {error}")
        return there
    differing = [] if before is None else _differences(before, comparison)
    if before is not None and differing:
        console.say(
            f"at its end this replaces the evaluation of step {before.checkpoint.step} by {before.num_samples} samples, which "
            f"differs in {', '.join(differing)}; to keep that, copy {storage.url}/{folder} first"
        )
    return there


def _differences(before: Metrics, comparison: Comparison) -> list[str]:
    """The ways in which an earlier evaluation differs from this one, except for the figures."""
    checkpoint = _checkpoint(comparison)
    same = {
        "the student": before.checkpoint.sha256 == checkpoint.sha256
        if before.checkpoint.sha256
        else before.checkpoint.path == checkpoint.path,
        "its step": before.checkpoint.step == checkpoint.step,
        "ema_decay": before.checkpoint.ema_decay == checkpoint.ema_decay,
    }
    return [what for what, is_same in same.items() if not is_same] + setting_differences(before, comparison)


def _checkpoint(comparison: Comparison) -> Checkpoint:
    student = comparison.subject.student
    return Checkpoint(
        path=student.address,
        step=student.step,
        ema_decay=student.ema_decay,
        sha256=student.sha256,
        features=student.features,
    )


def _student_row(comparison: Comparison, found: Findings) -> StudentRow:
    errors = found.student.trajectory_error
    times = map(str, comparison.config.trajectories.time_points)
    cost = found.student.cost
    return StudentRow.model_validate(
        {
            **found.of_student.values(),
            "cost_in_teacher_evaluations": cost.cost_in_teacher_evaluations if cost else None,
            "images_per_second": cost.images_per_second if cost else None,
            "trajectory_error": dict(zip(times, errors, strict=True)) if errors else None,
        }
    )


def _trained_on(comparison: Comparison) -> Iterator[str]:
    """A warning if the student was trained on the features by which its distance is measured."""
    extractor = extractor_of(comparison)
    if _checkpoint(comparison).was_trained_by(extractor):
        yield (
            "the student was trained to have the mean and covariance that real images have in the features "
            f"of {extractor.name}, by which its distance is measured: judge it by the other figures too, or by an extractor "
            "that it has not seen"
        )


class _Beside(TypedDict):
    name: str
    protocol: str | None
    num_samples: int
    reference: ReferenceFacts
    feature_extractor: ExtractorName
    other_extractors: dict[str, str]
    warnings: tuple[str, ...]
    versions: dict[str, str]
    code: Code


def _beside(
    comparison: Comparison | ImagesComparison, surroundings: Surroundings, resolution: int, count: int
) -> _Beside:
    """What is recorded beside every figure: the reference, the extractors, versions, and warnings."""
    reference = surroundings.reference
    readings: Readings = comparison.readings
    weights: dict[str, WeightsFile] = comparison.weights
    return _Beside(
        name=comparison.config.name,
        protocol=comparison.config.evaluation.protocol,
        num_samples=count,
        reference=ReferenceFacts(
            what=comparison.config.evaluation.reference,
            count=reference.count if reference else None,
            resolution=reference.resolution if reference else None,
            identity=reference.identity.model_dump(mode="json") if reference else None,
        ),
        feature_extractor=extractor_of(comparison),
        other_extractors=other_extractors_of(comparison),
        warnings=tuple(warnings_of(readings, weights, reference, count, resolution)) if reference else (),
        versions=surroundings.environment.versions,  # those of the actors, which may have GPUs
        code=code_version(),
    )
