"""The teacher's rows of the table: which there are, and those that were measured before and are kept."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from dsno_cluster.config import Config
from dsno_cluster.diffusion.solvers import count_evaluations
from dsno_cluster.evaluation.actor import Source
from dsno_cluster.evaluation.features import Reading, WeightsFile
from dsno_cluster.evaluation.reference import RealData
from dsno_cluster.model_folder import package_path
from dsno_cluster.provenance import software_versions
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import MissingObject, Storage
from dsno_cluster.teachers import find_teacher

SHIPPED_ROWS = "evaluation.json"


def teacher_sources(config: Config) -> list[Source]:
    """The teacher's rows of the table: DDIM at several costs, and the solver that made the trajectories.

    A distilled teacher knows the levels of its own steps alone, so of it only those costs that leave some of them out.
    """
    teacher, made_by = find_teacher(config).info, as_trajectories(config)
    costs = config.evaluation.teacher_steps
    if teacher.distilled and teacher.num_steps is not None:
        costs = tuple(steps for steps in costs if teacher.num_steps % steps == 0)
    rows = [Source("teacher", "ddim", steps) for steps in costs]
    rows = rows if made_by in rows else [*rows, made_by]
    return sorted(rows, key=lambda source: evaluations_of(source, config))


def as_trajectories(config: Config) -> Source:
    """The row of the solver that made the trajectories."""
    settings = config.trajectories
    grid = find_teacher(config).method.grid
    grid = grid if isinstance(grid, str) else "auto"
    return Source("teacher", settings.solver, settings.steps, settings.time_points, grid)


def evaluations_of(source: Source, config: Config) -> int:
    """Network evaluations of a teacher's row for one image."""
    guidance = config.trajectories.guidance_scale
    native = find_teacher(config).own_steps if source.grid == "auto" else None
    return count_evaluations(source.solver, source.steps, guidance, source.times, native or source.grid)


def row_key(source: Source) -> str:
    if source.kind == "student":
        return "student"
    grid = "" if source.grid == "uniform" else f" on {source.grid}"
    return f"{source.solver} {source.steps} through {' '.join(map(str, source.times))}{grid}"


def comparison_spec(
    config: Config, read: dict[str, Reading], weights: dict[str, WeightsFile], real: RealData
) -> dict[str, Any]:
    """What a teacher's stored row must agree in to stand beside the student's."""
    settings, precision = config.evaluation, config.teacher.precision
    main = settings.feature_extractor
    knobs = {
        "kid": ("kid_subsets", "kid_subset_size", "metric_seed"),
        "inception_score": ("inception_splits", "metric_seed"),
        "precision_recall": ("neighborhood",),
    }
    chosen = {key: getattr(settings, key) for metric in read for key in knobs.get(metric, ())}
    others = {name: file.sha256 for name, file in weights.items() if name != main}
    identity = {
        "statistics": real.statistics.identity if real.statistics else None,
        "images": real.images.identity if real.images else None,
    }
    return {
        "teacher": find_teacher(config).info.identity.model_dump(mode="json"),
        **({} if precision == "float32" else {"precision": precision}),
        **chosen,
        **({"other_extractors": others} if others else {}),
        "feature_extractor": {
            "name": main,
            "weights_sha256": weights[main].sha256 if main in weights else None,
        },
        "reference": settings.reference if settings.reference == "data" else identity,
        "num_samples": settings.num_samples,
        "seed": settings.seed,
        "metrics": [m for m in settings.metrics if m != "trajectory_error"],
        "guidance_scale": config.trajectories.guidance_scale,
        "clip_denoised": config.trajectories.clip_denoised,
    }


def stored_teacher_rows(config: Config, storage: Storage, spec: dict[str, Any]) -> dict[str, Any]:
    """Rows measured before with an equal spec: in storage, or shipped with the teacher."""
    found: dict[str, Any] = {}
    shipped = Path(package_path(str(config.teacher.path))) / SHIPPED_ROWS
    if shipped.is_file():
        content = json.loads(shipped.read_text())
        if content["spec"] == spec:
            found |= {key: {**row, "shipped": True} for key, row in content["rows"].items()}
    with contextlib.suppress(MissingObject):
        found |= json.loads(storage.read(_rows_key(spec)))["rows"]
    return found


def store_teacher_rows(storage: Storage, spec: dict[str, Any], rows: dict[str, Any]) -> None:
    """Keep the teacher's rows: they cost more than the student's and do not change."""
    content = {"spec": spec, "rows": rows, "versions": software_versions()}
    storage.write(_rows_key(spec), (json.dumps(content, indent=2) + "\n").encode())


def _rows_key(spec: dict[str, Any]) -> str:
    return f"evaluation/teachers/{canonical_hash(spec)}.json"
