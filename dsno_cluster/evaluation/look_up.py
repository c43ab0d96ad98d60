"""The first step of an evaluation: what is compared with what, and what is known already.

Nothing is drawn here.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsno_cluster import console
from dsno_cluster.cluster.crew import Crew, actor_count
from dsno_cluster.config import Config
from dsno_cluster.diffusion.schedule import same_times
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.actor import StudentAtWork
from dsno_cluster.evaluation.kept_rows import KeptRows
from dsno_cluster.evaluation.measure import ImagesOf
from dsno_cluster.evaluation.metrics import OF_REFERENCE, check_count, fewest
from dsno_cluster.evaluation.records import TeacherRow
from dsno_cluster.evaluation.reference import (
    RealData,
    check_reference_is_there,
    compared_data,
    find_real_data,
    held_out_images,
)
from dsno_cluster.evaluation.sample_shards import SampleSpec, sample_spec
from dsno_cluster.evaluation.sources import HELD_OUT, STUDENT, ImageSource
from dsno_cluster.evaluation.teacher_rows import ComparisonSpec, comparison_spec, known_rows
from dsno_cluster.features.extractors import (
    Readings,
    WeightsFile,
    check_shape,
    find_all_weights,
    find_readings,
)
from dsno_cluster.image_sets.image_set import ImageSet
from dsno_cluster.model_folder import (
    FeatureWeights,
    StartModel,
    evaluated_by_default,
    find_model,
    model_address,
)
from dsno_cluster.storage import Storage, absolute_address, open_storage
from dsno_cluster.students.dsno import student_model
from dsno_cluster.teachers import (
    ConfiguredTeacher,
    DecoderIdentity,
    Sampling,
    States,
    compared_samplings,
    find_teacher,
    states_of,
)
from dsno_cluster.trajectories.shards import read_manifest
from dsno_cluster.trajectories.spec import spec_of


@dataclass(frozen=True)
class Student:
    """A student, or one of its moving averages: its address, and facts from its `meta.json`."""

    address: str
    sha256: str
    step: int | None
    ema_decay: float | None
    train_seconds: float | None
    start: StartModel | None = None
    features: FeatureWeights | None = None  # on which it was trained

    @property
    def title(self) -> str:
        """Its checkpoint in words.

        Part of the title of the progress, which so shows when a job reaches the next one.
        """
        return f"step {self.step}" + (f", average {self.ema_decay:g}" if self.ema_decay else "")


@dataclass(frozen=True)
class Subject:
    """A student and the teacher that it is compared with."""

    config: Config
    teacher: ConfiguredTeacher
    student: Student


@dataclass(frozen=True)
class KeptSamples:
    """The folder in which the student's samples are kept as shards, and their spec."""

    folder: str
    spec: SampleSpec


@dataclass(frozen=True)
class Comparison:
    """An evaluation before it is measured.

    `readings` are the layers that metrics read, `samplings` the teacher's rows, `known` those measured
    before, `spec` what all rows have in common, `held_out` the real images that are measured beside them. The results are
    written below `folder` of the `storage`.
    """

    subject: Subject
    storage: Storage
    folder: str
    readings: Readings
    weights: dict[str, WeightsFile]
    real: RealData
    spec: ComparisonSpec
    samplings: tuple[Sampling, ...]
    known: dict[Sampling, TeacherRow]
    keep: KeptSamples | None
    held_out: ImageSet | None

    @property
    def config(self) -> Config:
        return self.subject.config

    @property
    def missing(self) -> list[Sampling]:
        """The teacher's rows that are still to be measured."""
        return [sampling for sampling in self.samplings if sampling not in self.known]

    @property
    def kept_rows(self) -> KeptRows:
        """Where the images of rows are that an evaluation did not finish."""
        spec = spec_of(self.config, self.subject.teacher)
        return KeptRows(self.storage, spec, self.config.evaluation, self.decoder)

    @property
    def states(self) -> States:
        """What the states of teacher and student are."""
        return self.subject.teacher.states

    @property
    def decoder(self) -> DecoderIdentity | None:
        """What decodes their states; None if these are images."""
        return self.states.identity(self.config.evaluation.precision)

    @property
    def at_work(self) -> StudentAtWork:
        """The student as actors receive it."""
        student, keep = self.subject.student, self.keep
        spec = spec_of(self.config, self.subject.teacher)
        return StudentAtWork(
            absolute_address(student.address),
            student.sha256,
            spec,
            self.states,
            keep.folder if keep else None,
        )

    def sets(self) -> list[ImagesOf]:
        """The images to measure."""
        settings, shape = self.config.evaluation, self.states.image_shape
        drawn = [ImageSource("teacher", sampling) for sampling in self.missing]
        if self.readings or self.keep is not None:
            drawn.append(STUDENT)
        found = [
            ImagesOf(source, settings.num_samples, self.readings, shape, settings.draws) for source in drawn
        ]
        return [*found, *_held_out(self.config, self.held_out, self.readings)]


@dataclass(frozen=True)
class ImagesComparison:
    """The evaluation of existing images, before it is measured."""

    config: Config
    storage: Storage
    address: str
    images: ImageSet
    readings: Readings
    weights: dict[str, WeightsFile]
    real: RealData
    held_out: ImageSet | None = None

    @property
    def source(self) -> ImageSource:
        return ImageSource("images", address=self.images.address)

    def sets(self) -> list[ImagesOf]:
        """The images to measure, and the held-out real ones if copies are counted by them."""
        found = [ImagesOf(self.source, self.images.count, self.readings, self.images.shape)]
        nearest = {metric: reading for metric, reading in self.readings.items() if metric == "nearest"}
        return found if self.source == HELD_OUT else [*found, *_held_out(self.config, self.held_out, nearest)]


def _held_out(config: Config, images: ImageSet | None, readings: Readings) -> list[ImagesOf]:
    """The held-out real images, if there are any, for those of the metrics for which they are enough."""
    if images is None or not readings:
        return []
    needed = fewest(config.evaluation)
    possible = {
        metric: reading for metric, reading in readings.items() if needed.get(metric, 0) <= images.count
    }
    return [ImagesOf(HELD_OUT, images.count, possible, images.shape)]


def find_student(config: Config, student_path: str | None = None) -> Student:
    """The student to evaluate: the one at `student_path`, or the config's newest; after distribution matching, its best.

    Its address is that of a step, because a training that continues moves `latest`. Raises UserError if there
    is none, if it does not have the config's network and times, and if it was trained on the noise of the
    evaluation.
    """
    endpoint = config.storage.endpoint_url
    try:
        given = student_path or evaluated_by_default(config.student_address, endpoint)
        path = model_address(given, endpoint)
        found = find_model(path, endpoint, config.evaluation.ema_decay)
    except UserError as error:
        how = (
            "name one that exists"
            if student_path
            else "`dsno-cluster train` makes it; --student names another"
        )
        raise UserError(f"{error}; {how}") from None
    found.check_weights()
    meta = found.meta
    model = student_model(meta, path)
    if model.network != config.network:
        raise UserError(
            f"network: not that of the student at {path}; pass the config that it was trained with"
        )
    if not same_times(model.times, config.trajectories.time_points):
        raise UserError(
            f"trajectories.times: the student at {path} answers {list(model.times)}, "
            f"the config asks for {list(config.trajectories.time_points)}"
        )
    if meta.seed == config.evaluation.seed:
        raise UserError(
            f"evaluation.seed {config.evaluation.seed}: the student at {path} was trained on the noise of that seed; "
            "take another"
        )
    about = meta.step, meta.ema_decay, meta.train_seconds, meta.start, meta.features
    return Student(path, meta.sha256, *about)


def find_subject(
    config: Config, student_path: str | None = None, teacher: ConfiguredTeacher | None = None
) -> Subject:
    """The student to evaluate and its teacher, which is found unless it is given.

    Raises UserError as `find_student` and `find_teacher` do.
    """
    student = find_student(config, student_path)
    return Subject(config, teacher or find_teacher(config), student)


def check_comparison(config: Config) -> None:
    """Raises UserError if a part of the reference is missing, and WorkError without weights.

    Published weights are downloaded here, because the nodes of a cluster may have no internet access.
    """
    readings, weights = find_readings(config.evaluation), _find_weights(config)
    compared = {metric: reading for metric, reading in readings.items() if metric in OF_REFERENCE}
    _check_sampled(config, weights, states_of(config))
    compared_data(config, compared, weights)


def look_up(subject: Subject, folder: str | None = None) -> Comparison:
    """What is known about a comparison before anything is drawn.

    Its results are written to `folder` (default: `evaluation/<name>/`). Raises UserError as
    `check_comparison` does, and if samples of this student and seed were kept with other settings.
    """
    config = subject.config
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    keep = _kept_samples(subject, storage)
    readings, weights = find_readings(config.evaluation), _find_weights(config)
    _check_sampled(config, weights, subject.teacher.states)
    real = find_real_data(config, storage, readings, weights)
    held_out = held_out_images(config) if readings else None
    spec = comparison_spec(config, subject.teacher, readings, weights, real, held_out)
    # without a metric on images, the teacher's need not be drawn
    samplings = compared_samplings(config, subject.teacher) if readings else []
    return Comparison(
        subject=subject,
        storage=storage,
        folder=folder or f"evaluation/{config.name}/",
        readings=readings,
        weights=weights,
        real=real,
        spec=spec,
        samplings=tuple(samplings),
        known=known_rows(storage, spec, subject.teacher, samplings),
        keep=keep,
        held_out=held_out,
    )


def look_up_images(config: Config, images: ImageSet, address: str) -> ImagesComparison:
    """The same for existing images at `address`.

    Raises UserError if no metric applies, or there are too few images.
    """
    settings = config.evaluation
    readings = {
        metric: reading
        for metric, reading in find_readings(settings).items()
        if metric != "agreement" or images.labels_at is not None
    }
    if not readings:
        raise UserError(f"evaluation.metrics: none of {', '.join(settings.metrics)} needs only images")
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    weights = _find_weights(config)
    if settings.protocol is not None and images.count != settings.num_samples:
        raise UserError(
            f"evaluation.protocol {settings.protocol}: is of {settings.num_samples} images, {address} has {images.count}"
        )
    check_count(settings, readings, images.count, address)
    check_shape(weights, images.shape, address)
    real = find_real_data(config, storage, readings, weights)
    held_out = held_out_images(config) if "nearest" in readings else None
    return ImagesComparison(config, storage, address, images, readings, weights, real, held_out)


def say_what(comparison: Comparison, crew: Crew) -> None:
    """Say in a line what will be compared, by how many actors, and what need not be measured again."""
    settings, weights = comparison.config.evaluation, comparison.weights
    path = comparison.subject.student.address
    real = f"{comparison.real.count or 'the'} real images by {', '.join(weights)}"
    what = (
        f"{settings.drawn} samples of {path} against {real}"
        if comparison.readings
        else f"{settings.trajectory_samples} trajectories of {path} against the teacher's"
    )
    known = ""
    if comparison.samplings:
        shipped = sum(bool(row.shipped) for row in comparison.known.values())
        came = f", {shipped} of them ship with the teacher" if shipped else ""
        rows = f"{len(comparison.known)} of the teacher's {len(comparison.samplings)} rows"
        known = f"; {rows} were measured before{came}"
    console.say(f"{what}, {actor_count(crew, settings.threads)}{known}")
    if comparison.real.images is not None:
        comparison.real.images.say_note()


def _find_weights(config: Config) -> dict[str, WeightsFile]:
    """The weights of the config's metrics.

    A missing reference is reported before any weights are downloaded.
    """
    check_reference_is_there(config)
    return find_all_weights(config.evaluation)


def _check_sampled(config: Config, weights: dict[str, WeightsFile], states: States) -> None:
    """Raises UserError if the metrics cannot be measured on samples with such states."""
    if of_images := [metric for metric in config.evaluation.metrics if metric != "trajectory_error"]:
        states.check_decoded(f"evaluation.metrics: {', '.join(of_images)}", "measure only trajectory_error")
    check_shape(weights, states.image_shape, "the samples")
    if "agreement" in config.evaluation.metrics and not config.network.num_classes:
        raise UserError("evaluation.metrics: agreement is of classes, and network.num_classes is 0")


def _kept_samples(subject: Subject, storage: Storage) -> KeptSamples | None:
    """Where the student's samples are to be kept.

    Raises UserError if samples with other settings are kept there.
    """
    settings, student = subject.config.evaluation, subject.student
    if not settings.keep_samples:
        return None
    subject.teacher.states.check_decoded("evaluation.keep_samples", "set it to false")
    spec = SampleSpec(
        student=student.sha256,
        seed=settings.seed,
        samples_per_shard=settings.batch_size,
        threads=settings.threads,
        precision=settings.precision,
        compile=bool(settings.compile),
        decoder=subject.teacher.states.identity(settings.precision),
    )
    folder = f"samples/{student.sha256[:16]}-{settings.seed}/"
    kept = read_manifest(storage, folder)
    if kept is not None and sample_spec(kept[0]) != spec:
        raise UserError(
            f"{storage.url}/{folder}: holds samples of another evaluation.batch_size, threads, precision or compile, or of "
            "another decoder; go back to those, or delete that folder"
        )
    return KeptSamples(folder, spec)
