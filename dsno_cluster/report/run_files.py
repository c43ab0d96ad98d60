"""What a run has left in files, for the report: read without torch, a GPU or Ray. What is not there is None or empty."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsno_cluster.cluster.runs import Run, all_runs
from dsno_cluster.config import Config, with_absolute_paths
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.history import history_key
from dsno_cluster.model_folder import read_config_of, read_meta
from dsno_cluster.storage import MissingObject, Storage, open_storage
from dsno_cluster.trajectories.plan import Size, make_plan, size_of
from dsno_cluster.trajectories.shards import Manifest, read_manifest

METRICS_KEYS = ("student", "teacher_rows", "feature_extractor")
PICTURES = ("teacher.png", "student.png", "strips.png")


@dataclass(frozen=True)
class RunFiles:
    """The files of a run.

    `metrics`: metrics.json of `eval`, or of the checkpoint that `eval --watch` found best. `curve`: lines of metrics.jsonl,
    by step. `history`: what `eval --watch` found, by checkpoint. `student`: meta.json of the newest student, and
    `trained_with` the config in its folder. `pictures`: data URIs by name. `runs`: what was submitted, oldest first.
    `places`: where each was looked for.
    """

    config: Config
    metrics: dict[str, Any] | None
    curve: list[dict[str, Any]]
    history: dict[str, Any] | None
    student: dict[str, Any] | None
    trained_with: dict[str, Any]
    manifest: Manifest | None
    size: Size
    pictures: dict[str, str]
    runs: list[Run]
    places: dict[str, str]


def read_run_files(config: Config) -> RunFiles:
    """Everything that the run of a config has left so far.

    Raises UserError where there is neither a training curve nor an evaluation, and for files that are not what they
    should be; WorkError where the storage fails.
    """
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    folder = f"evaluation/{config.name}/"
    curve_file = config.run_dir / config.student_prefix / "metrics.jsonl"
    places = {
        "metrics": f"{storage.url}/{folder}metrics.json",
        "history": f"{storage.url}/{history_key(config)}",
        "curve": str(curve_file),
    }
    metrics = _read_json(storage, folder + "metrics.json", *METRICS_KEYS)
    history = _read_json(storage, history_key(config), "rows")
    if (
        metrics is None and history is not None and history["rows"]
    ):  # `eval --watch` alone: what it found best
        folder = str(best_row(history).get("folder") or folder)
        metrics = _read_json(storage, folder + "metrics.json", *METRICS_KEYS)
    curve = _read_curve(curve_file)
    if metrics is None and history is None and not curve:
        raise UserError(
            f"{config.name}: nothing to report yet, neither {places['curve']} nor {places['metrics']} is there; "
            "`dsno-cluster train` and `dsno-cluster eval` make them"
        )
    address = config.student_address
    student = _unless_missing(lambda: read_meta(address, config.storage.endpoint_url))
    trained_with = _unless_missing(lambda: read_config_of(address, config.storage.endpoint_url))
    manifest = _find_manifest(config, storage, student)
    grid = manifest.spec.get("grid") if manifest else None
    return RunFiles(
        config=config,
        metrics=metrics,
        curve=curve,
        history=history,
        student=student,
        trained_with=trained_with or {},
        manifest=manifest,
        size=size_of(config, tuple(grid) if isinstance(grid, list) else None),
        pictures={name: uri for name in PICTURES if (uri := _picture(storage, folder + name))},
        runs=_runs_of(config),
        places=places,
    )


def best_row(history: dict[str, Any]) -> dict[str, Any]:
    """The row of a history with rows that its `best` names, or its last."""
    best = history.get("best") or {}
    same = [row for row in history["rows"] if all(row.get(k) == best.get(k) for k in ("step", "ema_decay"))]
    return dict((same or history["rows"])[-1])


def _read_json(storage: Storage, key: str, *needed: str) -> dict[str, Any] | None:
    """A JSON object with the keys `needed`, or None where it is not there. UserError for anything else."""
    where = f"{storage.url}/{key}"
    try:
        found = json.loads(storage.read(key))
    except MissingObject:
        return None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); delete it and make it again") from None
    missing = [name for name in needed if not isinstance(found, dict) or name not in found]
    if missing:
        raise UserError(f"{where}: has no {missing[0]!r}; it is not a file of `dsno-cluster eval`")
    return dict(found)


def _read_curve(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; the last may be half written, by a training that goes on."""
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{file}: line {number} is not JSON") from None
    return [line for line in found if isinstance(line, dict) and "step" in line]


def _unless_missing(read: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return read()
    except UserError:  # no student yet, or one that a newer version wrote
        return None


def _find_manifest(config: Config, storage: Storage, student: dict[str, Any] | None) -> Manifest | None:
    """That of the trajectories which the student was trained on, or else of those that the config plans."""
    folder = (student or {}).get("trajectories")
    if folder is None:
        try:
            folder = make_plan(config).folder
        except UserError:  # the teacher is not at hand here
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


def _runs_of(config: Config) -> list[Run]:
    """The newest submitted run of each stage of this experiment, in the order of their submission."""
    name, root = config.name, with_absolute_paths(config).storage.root
    newest: dict[str, Run] = {}
    for run in all_runs():
        record = run.record()
        if (record.name, record.root) == (name, root):
            newest.setdefault(record.stage, run)
    return list(reversed(newest.values()))
