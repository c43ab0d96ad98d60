"""The teacher's known rows of the table: kept in the storage, or shipped with the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.config.base import Named, later
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.metrics import ReferenceParts
from dsno_cluster.evaluation.records import TeacherRow, rewrite
from dsno_cluster.evaluation.reference import RealData
from dsno_cluster.features.extractors import Readings, WeightsFile
from dsno_cluster.image_sets.image_set import DataIdentity, ImageSet
from dsno_cluster.model_folder import package_path
from dsno_cluster.provenance import software_versions
from dsno_cluster.records import Record, canonical_hash, read_record
from dsno_cluster.storage import MissingObject, Storage
from dsno_cluster.teachers import ConfiguredTeacher, DecoderIdentity, Sampling
from dsno_cluster.teachers.loading import AnyTeacherIdentity

SHIPPED_ROWS = "evaluation.json"
FURTHER_ROWS = "evaluation-further.json"  # with the further metrics of the config's `finish`

# settings on which only these metrics depend
_KNOBS: dict[str, tuple[str, ...]] = {
    "kid": ("kid_subsets", "kid_subset_size", "metric_seed"),
    "inception_score": ("inception_splits", "inception_shuffle", "metric_seed"),
    "precision_recall": ("neighborhood", "neighborhood_precision"),
}


class ComparedBy(Named):
    """The main extractor, and the sha256 of its weights if a metric reads it."""

    name: str
    weights_sha256: str | None


class ComparisonSpec(Named):
    """What a stored row of the teacher must have in common with the student's.

    Its hash names the file of the rows.
    """

    teacher: AnyTeacherIdentity
    feature_extractor: ComparedBy
    reference: Literal["data"] | ReferenceParts
    num_samples: int
    seed: int
    metrics: tuple[str, ...]
    guidance_scale: float
    clip_denoised: bool
    guidance_interval: tuple[float, float] | None = later(None)
    guidance_channels: int | None = later(None)
    guide: AnyTeacherIdentity | None = later(None)
    draws: int = later(1)
    precision: str = later("float32")
    other_extractors: dict[str, str] = later({})
    kid_subsets: int | None = later(None)
    kid_subset_size: int | None = later(None)
    inception_splits: int | None = later(None)
    inception_shuffle: bool = later(True)
    neighborhood: int | None = later(None)
    neighborhood_precision: str = later("float32")
    metric_seed: int | None = later(None)
    decoder: DecoderIdentity | None = later(None)
    held_out: DataIdentity | None = later(None)  # the real images by which copies are counted


class TeacherRowsFile(Record):
    """The teacher's rows by `row_key`, and what they have in common."""

    schema_version: Literal[1] = 1
    made_by: str | None = None
    spec: ComparisonSpec
    rows: dict[str, TeacherRow]
    versions: dict[str, str] = Field(default_factory=dict)


def row_keys(sampling: Sampling) -> tuple[str, ...]:
    """The keys that a row may have in a file: its own, and those of the samplings that it replaces."""
    return tuple(dict.fromkeys([_row_key(sampling), *map(_row_key, sampling.same)]))


def _row_key(sampling: Sampling) -> str:
    method = sampling.method
    grid = method.grid if isinstance(method.grid, str) else "auto"  # the teacher's own steps
    on = "" if grid == "uniform" else f" on {grid}"
    return f"{method.solver} {method.steps} through {' '.join(map(str, sampling.times))}{on}"


def comparison_spec(
    config: Config,
    teacher: ConfiguredTeacher,
    readings: Readings,
    weights: dict[str, WeightsFile],
    real: RealData,
    held_out: ImageSet | None,
) -> ComparisonSpec:
    """The spec of a config's rows of the teacher; copies are counted by the `held_out` images."""
    settings = config.evaluation
    main = settings.feature_extractor
    knobs: dict[str, Any] = {
        key: getattr(settings, key) for metric in readings for key in _KNOBS.get(metric, ())
    }
    return ComparisonSpec(
        teacher=teacher.info.identity,
        feature_extractor=ComparedBy(
            name=main, weights_sha256=weights[main].sha256 if main in weights else None
        ),
        reference="data" if settings.reference == "data" else _parts_of(real),
        num_samples=settings.num_samples,
        draws=settings.draws,
        seed=settings.seed,
        metrics=tuple(m for m in settings.metrics if m != "trajectory_error"),
        guidance_scale=config.trajectories.guidance_scale,
        clip_denoised=config.trajectories.clip_denoised,
        guidance_interval=config.trajectories.guidance_interval,
        guidance_channels=config.trajectories.guidance_channels,
        guide=teacher.guide.info.identity if teacher.guide else None,
        precision=config.teacher.precision,
        other_extractors={name: file.sha256 for name, file in weights.items() if name != main},
        decoder=teacher.states.identity(settings.precision),
        held_out=held_out.identity if held_out and "nearest" in readings else None,
        **knobs,
    )


def _parts_of(real: RealData) -> ReferenceParts:
    statistics = real.statistics.identity if real.statistics else None
    assert statistics is None or isinstance(statistics, DataIdentity)
    return ReferenceParts(statistics=statistics, images=real.images.identity if real.images else None)


def known_rows(
    storage: Storage, spec: ComparisonSpec, teacher: ConfiguredTeacher, samplings: list[Sampling]
) -> dict[Sampling, TeacherRow]:
    """The rows that were measured before with an equal spec: in the storage, or shipped with the teacher.

    Rows that were measured under a former identity of the teacher are found too
    (`TeacherInfo.former_identities`). Raises UserError if a file in the storage cannot be read.
    """
    identities = (spec.teacher, *teacher.info.former_identities)
    specs = [spec.model_copy(update={"teacher": identity}) for identity in identities]
    stored = _shipped(teacher.path, specs)
    for one in reversed(specs):
        stored |= _read(storage, one)
    keys = {
        sampling: next((key for key in row_keys(sampling) if key in stored), None) for sampling in samplings
    }
    return {sampling: stored[key] for sampling, key in keys.items() if key is not None}


def keep_row(storage: Storage, spec: ComparisonSpec, sampling: Sampling, row: TeacherRow) -> None:
    """Add a row to those in the storage, which are expensive and do not change.

    Safe against other writers. Raises UserError if their file cannot be read, which is then kept.
    """

    def with_it() -> TeacherRowsFile:
        rows = {**_read(storage, spec), row_keys(sampling)[0]: row}
        return TeacherRowsFile(spec=spec, rows=rows, versions=software_versions())

    rewrite(storage, _file_key(spec), with_it)


def _shipped(path: str, specs: list[ComparisonSpec]) -> dict[str, TeacherRow]:
    found: dict[str, TeacherRow] = {}
    for name in (SHIPPED_ROWS, FURTHER_ROWS):
        found |= _shipped_in(Path(package_path(path)) / name, specs)
    return found


def _shipped_in(file: Path, specs: list[ComparisonSpec]) -> dict[str, TeacherRow]:
    if not file.is_file():
        return {}
    try:
        content = read_record(TeacherRowsFile, file.read_bytes(), str(file))
    except UserError as error:  # these rows only save work, and the file may not be ours
        console.say(f"note: {error}; it is ignored")
        return {}
    if content.spec not in specs:
        return {}
    return {key: row.model_copy(update={"shipped": True}) for key, row in content.rows.items()}


def _read(storage: Storage, spec: ComparisonSpec) -> Mapping[str, TeacherRow]:
    """The rows in the storage. Raises UserError if their file cannot be read, as it must not be overwritten."""
    try:
        data = storage.read(_file_key(spec))
    except MissingObject:
        return {}
    try:
        return read_record(TeacherRowsFile, data, f"{storage.url}/{_file_key(spec)}").rows
    except UserError as error:
        raise UserError(f"{error}; move it away to measure these rows again") from None


def _file_key(spec: ComparisonSpec) -> str:
    return f"evaluation/teachers/{canonical_hash(spec.model_dump(mode='json'))}.json"
