"""The files of an evaluation: metrics.json, history.json and those of measured images. Needs no torch.

Files of older versions have no `schema_version` and may lack keys that have a default here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field

from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.model_folder import FeatureWeights
from dsno_cluster.provenance import Code
from dsno_cluster.records import AnyRecord, Record, SparseRecord, Values, read_record, record_bytes
from dsno_cluster.storage import MissingObject, PreconditionFailed, Storage

ATTEMPTS = 10  # at writing a file that other processes may write too


class Figures(SparseRecord):
    """The measured figures of a set of images; figures that only a newer version knows are kept.

    `_ci95` is half the width of a figure's 95 % interval, `_std` the standard deviation over parts or subsets of the samples.
    """

    model_config = ConfigDict(extra="allow")
    fid: float | None = None
    fid_ci95: float | None = None
    fid_draws: tuple[float, ...] = ()
    sfid: float | None = None
    sfid_ci95: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    kid_ci95: float | None = None
    cmmd: float | None = None
    cmmd_ci95: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    f_score: float | None = None
    nearest: float | None = None
    nearest_low: float | None = None
    copies: float | None = None
    agreement: float | None = None

    def figure(self, name: str) -> float | None:
        """A figure by its name; None if it was not measured."""
        value = getattr(self, name, None)
        return value if isinstance(value, int | float) else None


class HeldOut(Figures):
    """Real images that are not part of the reference: the figures of a perfect sampler with as many samples."""

    num_samples: int


class TeacherRow(Figures):
    """The teacher with one solver.

    `evaluations`: of the network, per image; `shipped`: it came with the teacher.
    """

    source: str
    evaluations: int
    shipped: bool | None = None
    as_trajectories: bool | None = None


class Cost(Record):
    """Cost of a student's sample in evaluations of the teacher, and samples per second on one actor."""

    cost_in_teacher_evaluations: float
    images_per_second: float


class StudentRow(Figures):
    """The student's figures; a cost that could not be measured is None.

    `trajectory_error` is relative to the teacher's states, by time.
    """

    source: str = "student"
    cost_in_teacher_evaluations: float | None
    images_per_second: float | None
    trajectory_error: dict[str, float] | None = None


class StudentBefore(StudentRow):
    """The figures of the student with which the evaluated one began, from the evaluation of `name`, which was equal."""

    source: str = "student before finishing"
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # it names folders
    step: int | None = None
    sha256: str


class ExtractorName(Record):
    """A feature extractor and the sha256 of its weights."""

    name: str = "unknown extractor"
    weights_sha256: str | None = None


class ReferenceFacts(Record):
    """The real data: `what` in the config, number and height of images if recorded, and identity."""

    what: str = ""
    count: int | None = None
    resolution: int | None = None
    identity: Values | None = None


class Seeds(SparseRecord):
    """Seeds of the student's noise, of the trajectories, and of metrics that draw subsets."""

    noise: int | None = None
    trajectories: int | None = None
    metrics: int | None = None


class Checkpoint(Record):
    """The student that was evaluated; `features` are those on which it was trained, if it was."""

    path: str = ""
    step: int | None = None
    ema_decay: float | None = None
    sha256: str = ""
    features: FeatureWeights | None = None

    def was_trained_by(self, extractor: ExtractorName) -> bool:
        """Whether it was trained on the features of an extractor with the same weights."""
        return self.features is not None and self.features.sha256 == extractor.weights_sha256


class Layout(Record):
    """The layout of teacher.png, student.png and strips.png; sizes are in pixels of these files.

    The first two are `rows` of `columns` tiles, `tile` wide and as high (or `tile_height`), with `gap` between
    and around them, a row per class if there are classes. strips.png has a pair of rows, teacher over student,
    with `pair_gap` to the next pair, for each of `strips` (rows of the grids, of which it shows the first
    sample), and a column for each of `times`, the first of which is the noise.

    What is shown of `states`: images, with the noise at half contrast; latents that were `decoded`, the noise too; or of
    latents, which have `channels`, the first three as colours.
    """

    rows: int
    columns: int
    classes: int
    tile: int
    tile_height: int | None = None
    gap: int
    pair_gap: int
    strips: tuple[int, ...]
    times: tuple[float, ...]
    states: Literal["images", "decoded", "latents"] = "images"
    channels: int | None = None

    @property
    def height(self) -> int:
        """Of a tile."""
        return self.tile_height or self.tile


class Measurement(Record):
    """The keys that the files of all evaluations have beside their figures. `protocol` is that of the config."""

    known_by: ClassVar[str]  # a key that only files of this kind have
    schema_version: Literal[1] = 1
    name: str
    protocol: str | None = None
    num_samples: int
    reference: ReferenceFacts = ReferenceFacts()
    feature_extractor: ExtractorName = ExtractorName()
    other_extractors: dict[str, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    code: Code | None = None
    seeds: Seeds = Seeds()


class Metrics(Measurement):
    """metrics.json: a student and its teacher.

    Each row is of `draws` times `num_samples`. `decoder` turned the states into the images that were measured; None: they
    are images. `seconds` exclude the teacher's rows that were known before. `before`: if the student began as another one,
    whose evaluation is equal to this.
    """

    known_by: ClassVar[str] = "student"
    draws: int = 1
    checkpoint: Checkpoint = Checkpoint()
    teacher: Values | None = None
    decoder: Values | None = None
    precision: str = "float32"
    real_held_out: HeldOut | None = None
    teacher_rows: tuple[TeacherRow, ...] = ()
    student: StudentRow
    before: StudentBefore | None = None
    device: str | None = None
    seconds: float | None = None
    train_seconds: float | None = None
    pictures: Layout | None = None


class MeasuredImages(SparseRecord):
    """The address and identity of measured images."""

    address: str
    kind: str
    sha256: str | None = None
    bytes: int | None = None
    files: str | None = None


class ImagesMetrics(Measurement):
    """samples-<hash>.json: the figures of existing images."""

    known_by: ClassVar[str] = "figures"
    samples: MeasuredImages
    figures: Figures


class HistoryRow(Figures):
    """A checkpoint, or one of its moving averages.

    `evaluation` is a hash of the settings, `folder` has the rest.
    """

    step: int
    ema_decay: float | None
    sha256: str | None = None
    evaluation: str | None = None
    folder: str | None = None
    source: str | None = None
    cost_in_teacher_evaluations: float | None = None
    images_per_second: float | None = None
    trajectory_error: dict[str, float] | None = None


class Best(Record):
    """The best checkpoint by a metric."""

    step: int
    ema_decay: float | None = None
    metric: str = "fid"
    value: float


class History(Record):
    """history.json: what `eval --watch` measured, oldest first, and the best checkpoint that exists."""

    known_by: ClassVar[str] = "rows"
    schema_version: Literal[1] = 1
    rows: tuple[HistoryRow, ...] = ()
    best: Best | None = None


AnyFile = TypeVar("AnyFile", Metrics, ImagesMetrics, History)


def read_file(model: type[AnyFile], storage: Storage, key: str) -> AnyFile | None:
    """A file of an evaluation, or None if there is none. Raises UserError, which says what to do, if it is damaged."""
    where = f"{storage.url}/{key}"
    try:
        data = storage.read(key)
    except MissingObject:
        return None
    try:
        content: Any = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); delete it and make it again") from None
    if not isinstance(content, dict) or model.known_by not in content:
        raise UserError(
            f"{where}: has no {model.known_by!r}; it is not a file of `dsno-cluster eval`; move it away"
        )
    try:
        return read_record(model, data, where)
    except UserError as error:
        raise UserError(f"{error}; delete it and make it again") from None


def rewrite(storage: Storage, key: str, content: Callable[[], AnyRecord | None]) -> AnyRecord | None:
    """Write the record that `content` makes from the existing file, and return it; None: no change.

    Safe against other writers: the write is conditional, and the later writer makes its content again. Raises
    WorkError after `ATTEMPTS` failures.
    """
    for _ in range(ATTEMPTS):
        before = storage.stat(key)
        record = content()
        if record is None:
            return None
        try:
            if before is None:
                storage.write(key, record_bytes(record), if_absent=True)
            else:
                storage.write(key, record_bytes(record), if_match=before.etag)
            return record
        except PreconditionFailed:
            continue  # another was first: look at what it wrote
    raise WorkError(f"{storage.url}/{key}: kept changing under {ATTEMPTS} attempts to replace it")
