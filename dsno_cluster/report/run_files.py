"""The files of a run that the report shows; a missing one is None or empty. Needs no torch, GPU or Ray."""

from __future__ import annotations

import base64
import contextlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dsno_cluster.cluster.runs import Run, all_runs
from dsno_cluster.config import Config, DataConfig, Training, Trajectories, validate
from dsno_cluster.config.base import Strict
from dsno_cluster.config.renamed import with_current_names
from dsno_cluster.diffusion.solvers import Method
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.history import best_row, history_key
from dsno_cluster.evaluation.records import History, Layout, Metrics, read_file
from dsno_cluster.model_folder import LATEST, ModelMeta, evaluated_by_default, read_config_of, read_meta
from dsno_cluster.records import Record, Values
from dsno_cluster.storage import MissingObject, Stat, Storage, open_storage
from dsno_cluster.trajectories.plan import Size, make_plan, size_of
from dsno_cluster.trajectories.shards import Manifest, read_manifest, trajectory_spec
from dsno_cluster.trajectories.spec import TrajectorySpec, imported_folder

PICTURES = ("teacher.png", "student.png", "strips.png", "nearest.png")


class CurveLine(Record):
    """A line of metrics.jsonl, in which older trainings wrote fewer keys."""

    step: int
    loss: float | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    data_wait: float | None = None
    memory_gb: float | None = None
    heldout_error_per_time: tuple[float | None, ...] = ()
    heldout_distance: float | None = None


@dataclass(frozen=True)
class FirstTraining:
    """The training that made the student which a run has finished: its experiment, its curve, the config in its folder."""

    config: Config
    curve: list[CurveLine]
    trained_with: Values

    @property
    def trained(self) -> Config:
        """The config, with what the folder says of its data, its trajectories and its training."""
        return _as_trained(self.config, self.trained_with)


@dataclass(frozen=True)
class RunFiles:
    """The files of a run.

    `metrics`: metrics.json of `eval`, or of the checkpoint that `eval --watch` found best. `curve`: lines of
    metrics.jsonl, by step. `history`: the results of `eval --watch`, by checkpoint. `student`: meta.json of
    the newest student, `evaluated` that of the one that `eval` takes, and `trained_with` the config in its folder.
    `manifest`: that of the stored trajectories that the training of `begun` needs. `pictures`: data URIs by name, and
    `picture_before` that of the student before finishing, of the same noise. `runs`: submitted runs, oldest
    first. `places`: where each file was looked for. `first`: if `finish` of the reported config made the
    student, the training before.
    """

    config: Config
    metrics: Metrics | None
    curve: list[CurveLine]
    history: History | None
    student: ModelMeta | None
    evaluated: ModelMeta | None
    trained_with: Values
    manifest: Manifest | None
    size: Size
    pictures: dict[str, str]
    picture_before: str | None
    runs: list[Run]
    places: dict[str, str]
    first: FirstTraining | None = None

    @property
    def trained(self) -> Config:
        """The config, with what the student's folder says of its data, its trajectories and its training."""
        return _as_trained(self.config, self.trained_with)

    @property
    def begun(self) -> Config:
        """The `trained` of the training with which the student began: before finishing, if `finish` made it."""
        return (self.first or self).trained

    @property
    def layout(self) -> Layout | None:
        """The layout of the pictures, if the metrics have it."""
        return self.metrics.pictures if self.metrics else None

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a training curve nor an evaluation."""
        return self.metrics is None and self.history is None and not self.curve


def shown_config(config: Config) -> Config:
    """The experiment that the report of a config shows: the one that finishes its student, once there is anything of it."""
    finished = config.finished
    if finished is None:
        return config
    begun = curve_file(finished).exists() or any(_versions(finished))
    return finished if begun else config


def stored_versions(config: Config) -> tuple[str, *tuple[Stat | None, ...]]:
    """The name of the shown experiment, and which versions of its results are in the storage.

    They change when what the report shows of these does.
    """
    shown = shown_config(config)
    return shown.name, *_versions(shown)


def _versions(config: Config) -> tuple[Stat | None, ...]:
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    keys = (
        f"evaluation/{config.name}/metrics.json",
        history_key(config),
        config.student_prefix + LATEST,
    )
    return tuple(storage.stat(key) for key in keys)


def curve_file(config: Config) -> Path:
    return config.run_dir / config.student_prefix / "metrics.jsonl"


def read_run_files(config: Config) -> RunFiles:
    """All files of a config's run so far, those of the finished student once there are any.

    Raises UserError for damaged files, WorkError if the storage fails.
    """
    whole, config = config, shown_config(config)
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    folder = f"evaluation/{config.name}/"
    places = {
        "metrics": f"{storage.url}/{folder}metrics.json",
        "history": f"{storage.url}/{history_key(config)}",
        "curve": str(curve_file(config)),
    }
    metrics = read_file(Metrics, storage, folder + "metrics.json")
    history = read_file(History, storage, history_key(config))
    # only `eval --watch` was run: take what it found best
    if metrics is None and history is not None and history.rows:
        folder = best_row(history).folder or folder
        metrics = read_file(Metrics, storage, folder + "metrics.json")
    address = config.student_address
    student = _student_at(address, config.storage.endpoint_url)
    trained_with = _config_at(address, config.storage.endpoint_url)
    first = None if whole.name == config.name else _first_training(whole)
    begun = first.trained if first else _as_trained(config, trained_with)
    manifest = _find_manifest(config, storage, student)
    return RunFiles(
        config=config,
        metrics=metrics,
        curve=read_curve(config),
        history=history,
        student=student,
        evaluated=_student_at(_evaluated(address, config.storage.endpoint_url), config.storage.endpoint_url),
        trained_with=trained_with,
        manifest=manifest if begun.needs_trajectories and not begun.training.online else None,
        size=size_of(config, _method(manifest, places["metrics"]) if manifest else None),
        pictures={name: uri for name in PICTURES if (uri := _picture(storage, folder + name))},
        picture_before=_picture_before(storage, metrics) if metrics else None,
        runs=[run for one in dict.fromkeys((whole.name, config.name)) for run in _runs_of(whole, one)],
        places=places,
        first=first,
    )


def _first_training(config: Config) -> FirstTraining:
    trained_with = _config_at(config.student_address, config.storage.endpoint_url)
    return FirstTraining(config, read_curve(config), trained_with)


def _as_trained(config: Config, trained_with: Values) -> Config:
    """The config with the sections that say which trajectories a training needs; its own if they cannot be read."""
    sections: dict[str, type[Strict]] = {
        "data": DataConfig,
        "trajectories": Trajectories,
        "training": Training,
    }
    found: dict[str, Strict] = {}
    for name in sections.keys() & trained_with.keys():
        # a newer version wrote the section, or it is damaged: the config's own is used
        with contextlib.suppress(UserError):
            found[name] = validate(sections[name], trained_with[name], name)
    return config.model_copy(update=found)


def _method(manifest: Manifest, where: str) -> Method | None:
    """How the trajectories were solved; None for imported ones."""
    spec = trajectory_spec(manifest, where)
    return spec.method if isinstance(spec, TrajectorySpec) else None


def read_curve(config: Config) -> list[CurveLine]:
    """Lines of metrics.jsonl; the last may be half written by a running training. Raises UserError if they are damaged."""
    file = curve_file(config)
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(CurveLine.model_validate_json(line))
        except ValidationError as error:
            if number < len(lines):
                first = error.errors(include_url=False)[0]
                problem = (
                    "not JSON" if first["type"] == "json_invalid" else f"not of a training: {first['msg']}"
                )
                raise UserError(f"{file}: line {number} is {problem}") from None
    return found


def _student_at(address: str, endpoint_url: str | None) -> ModelMeta | None:
    """The newest student; None if there is none yet, or if a newer version wrote it."""
    try:
        return read_meta(address, endpoint_url)
    except UserError:
        return None


def _evaluated(address: str, endpoint_url: str | None) -> str:
    """The address of the student in a run folder that `eval` takes, or of the folder if there is none."""
    try:
        return evaluated_by_default(address, endpoint_url)
    except UserError:
        return address


def _config_at(address: str, endpoint_url: str | None) -> Values:
    """The config in the newest student's folder, by the current names of its keys; empty if there is none."""
    try:
        return with_current_names(read_config_of(address, endpoint_url))[0]
    except UserError:
        return {}


def _find_manifest(config: Config, storage: Storage, student: ModelMeta | None) -> Manifest | None:
    """The manifest of the student's trajectories, or else of those that the config plans."""
    imported = config.trajectories.imported
    folder = student.trajectories if student else imported_folder(imported) if imported else None
    if folder is None:
        try:
            folder = make_plan(config).folder
        except UserError:  # the teacher is not on this machine
            return None
    try:
        found = read_manifest(storage, folder)
    except UserError:
        return None
    return found[0] if found else None


def _picture(storage: Storage, key: str) -> str | None:
    try:
        return "data:image/png;base64," + base64.b64encode(storage.read(key)).decode()
    except MissingObject:
        return None


def _picture_before(storage: Storage, metrics: Metrics) -> str | None:
    """student.png of the student before finishing, if the evaluation there is still that one, and laid out in the same way."""
    before = metrics.before
    if before is None:
        return None
    folder = f"evaluation/{before.name}/"
    try:
        there = read_file(Metrics, storage, folder + "metrics.json")
    except UserError:
        return None
    if there is None or there.checkpoint.sha256 != before.sha256:
        return None
    alike = (there.pictures, there.seeds.noise) == (metrics.pictures, metrics.seeds.noise)
    return _picture(storage, folder + "student.png") if alike else None


def _runs_of(config: Config, name: str) -> list[Run]:
    """The newest submitted run of each stage of the experiment of that name, in the order of their submission."""
    root = config.storage.root
    newest: dict[str, Run] = {}
    for run in all_runs():
        record = run.record()
        if (record.name, record.root) == (name, root):
            newest.setdefault(record.stage, run)
    return list(reversed(newest.values()))
