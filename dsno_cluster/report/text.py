"""The report's text and tables: introduction, cost, settings, and how to reproduce the run."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import JsonValue

from dsno_cluster import __version__, console
from dsno_cluster.config import config_values
from dsno_cluster.errors import without_passwords
from dsno_cluster.evaluation.records import Metrics
from dsno_cluster.files import shown_path
from dsno_cluster.model_folder import ModelMeta
from dsno_cluster.provenance import Code, Environment
from dsno_cluster.records import Values
from dsno_cluster.report.run_files import RunFiles
from dsno_cluster.trajectories.plan import bytes_text
from dsno_cluster.yaml_text import dump_yaml

# sections in which a student's own config must agree with the reported config
TRAINED = ("seed", "data", "network", "teacher", "trajectories", "student", "training")
# keys for monitoring and checkpoints: they do not change the student
WATCHED = {
    f"training.{key}"
    for key in (
        "log_every",
        "tensorboard",
        "wandb",
        "wandb.project",
        "wandb.entity",
        "wandb.mode",
        "heldout_every",
        "heldout_samples",
        "picture_every",
        "checkpoint_every",
        "keep_checkpoints",
        "threads",
    )
}
_NOT_RECORDED = "not recorded"

Facts = list[tuple[str, str]]


def introduction(files: RunFiles) -> str:
    """An introduction to the run, in a sentence or two."""
    config, student = files.config, files.student
    text = f"A DSNO student of the teacher {config.teacher.path or 'that is not named'}"
    step = _newest_step(files)
    if step is not None:
        done = "finished" if _is_finished(files) else "trained"
        text += f", {done} to step {step:,} of {_trained(files, 'steps'):,}"
    text += f"{', after a training' if files.first else ''}{_on_trajectories(files)}."
    evaluated = files.metrics.checkpoint.step if files.metrics else None
    if evaluated is not None:
        text += f" Evaluated at step {evaluated:,}."
    elif student is None and files.metrics is None:
        text += " No student is published yet."
    return text


def _is_finished(files: RunFiles) -> bool:
    """Whether the student was trained by its samples, which it draws, and not by trajectories."""
    return files.trained.training.objective == "distribution"


def _on_trajectories(files: RunFiles) -> str:
    """What trajectories were to a training, as the end of a sentence about it; empty if it needed none."""
    begun, size = files.begun, files.size
    if not begun.needs_trajectories:
        return ""
    count = files.manifest.num_samples if files.manifest else size.num_samples
    made = f"of {size.evaluations_per_sample} evaluations each"
    if begun.trajectories.imported is not None:
        made = "imported from elsewhere"
    elif begun.training.online:
        made += ", made while training"
    if begun.training.objective == "trajectories":
        how = " on"
    elif begun.training.reads_trajectories:
        how = ", anchored to"
    else:
        how = ", judged by the ends of"
    return f"{how} {count:,} trajectories {made}"


def warnings_of(files: RunFiles) -> list[str]:
    """The warnings of eval, and one if the evaluation is older than the newest student."""
    metrics = files.metrics
    found = list(metrics.warnings) if metrics else []
    evaluated = metrics.checkpoint.step if metrics else None
    taken = files.evaluated.step if files.evaluated else None
    if evaluated is not None and taken is not None and evaluated != taken:
        newest = files.student is not None and files.student.step == taken
        found.append(
            f"The evaluation is of step {evaluated:,}; the {'newest' if newest else 'best'} student is of step {taken:,}."
        )
    return found


def differences(files: RunFiles, most: int = 6) -> list[str]:
    """Keys that changed during training, and keys in which this config is not the student's."""
    ours = dict(_flat({key: value for key, value in config_values(files.config).items() if key in TRAINED}))
    theirs = dict(_flat({key: files.trained_with[key] for key in TRAINED if key in files.trained_with}))
    found = [
        f"{key} is {_plain(ours[key])} in the config of this report; the student was trained with {_plain(theirs[key])}."
        for key in ours
        if key in theirs and key not in WATCHED and not _same(ours[key], theirs[key])
    ]
    more = [f"{len(found) - most} more keys differ."] if len(found) > most else []
    changed = [
        f"{change.key} was {_plain(change.before)} until step {change.step:,} of the training, then {_plain(change.after)}."
        for change in (files.student.changes if files.student else ())
    ]
    return changed + found[:most] + more


def _flat(values: JsonValue, prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _same(ours: JsonValue, theirs: JsonValue) -> bool:
    if isinstance(ours, str) and isinstance(theirs, str):  # a submitted run has made its paths absolute
        return ours == theirs or ours.endswith("/" + theirs) or theirs.endswith("/" + ours)
    return bool(ours == theirs)


def _trained(files: RunFiles, key: str) -> int:
    """A number of the `training` section with which the student was trained, or else of the config."""
    found = _section(files, "training").get(key)
    return found if isinstance(found, int) else int(getattr(files.config.training, key))


def _section(files: RunFiles, name: str) -> Values:
    """A section of the config with which the student was trained, or else of the reported config."""
    found = files.trained_with.get(name)
    return found if isinstance(found, dict) and found else config_values(files.config)[name]


def _newest_step(files: RunFiles) -> int | None:
    steps = [line.step for line in files.curve[-1:]]
    published = files.student.step if files.student else None
    return max([*steps, *([] if published is None else [published])], default=None)


def cost_of(files: RunFiles) -> Facts:
    """Evaluations, seconds and bytes, by stage."""
    metrics, student, finished = files.metrics, files.student, _is_finished(files)
    rows = _cost_of_trajectories(files) if files.begun.needs_trajectories else []
    last = files.curve[-1] if files.curve else None
    known = [
        last.seconds if last else None,
        student.train_seconds if student else None,
        metrics.train_seconds if metrics else None,
    ]
    seconds = next((found for found in known if found is not None), None)
    before = files.first.curve[-1] if files.first and files.first.curve else None
    if before is not None:
        rows.append(("Training before finishing", f"{before.step:,} steps"))
        rows.append(("Time to train before", _duration(before.seconds)))
    step = _newest_step(files)
    if step is not None:
        images = step * _trained(files, "batch_size")
        seen = f"{images:,} {'samples drawn' if finished else 'trajectories seen'}"
        rows.append(("Finishing" if finished else "Training", f"{step:,} steps, {seen}"))
        rows.append(("Time to train", _duration(seconds)))
        if student is not None and student.world_size is not None:
            rows.append(("Training processes", str(student.world_size)))
    if last is not None and last.images_per_second is not None:
        rate = f"{last.images_per_second:,.0f} a second"
        if last.data_wait is not None:
            rate += f"; {last.data_wait:.1%} of the time waiting for data"
        rows.append(("Samples trained on" if finished else "Trajectories trained on", rate))
    if last is not None and last.memory_gb is not None:
        rows.append(("Most memory of a process", f"{last.memory_gb:.2f} GB"))
    return rows + (_cost_of_evaluation(metrics) if metrics else [])


def _cost_of_trajectories(files: RunFiles) -> Facts:
    size, manifest, begun = files.size, files.manifest, files.begun
    count = manifest.num_samples if manifest else size.num_samples
    each = f"{size.evaluations_per_sample:,} each"
    if begun.training.online:  # how often each was made is not recorded
        return [("Trajectories", f"{count:,}, made while training"), ("Evaluations of the teacher", each)]
    evaluations = f"{each}, {count * size.evaluations_per_sample:,} in all"
    if begun.trajectories.imported is not None:
        evaluations = "not known: the trajectories were imported"
    if manifest is None:
        planned = f"{count:,} planned; none are finished at {shown_path(files.config.storage.root)}"
        return [("Trajectories", planned), ("Evaluations of the teacher", evaluations)]
    held = sum(shard.size for shard in manifest.shards)
    return [
        ("Trajectories", f"{count:,}"),
        ("Evaluations of the teacher", evaluations),
        ("Their size", f"{bytes_text(held)} ({held:,} bytes) in {len(manifest.shards):,} shards"),
        ("Time to make them", _duration(manifest.environment.seconds)),
    ]


def _cost_of_evaluation(metrics: Metrics) -> Facts:
    rows, row = [], metrics.student
    if metrics.seconds is not None:
        took = _duration(metrics.seconds) + ", rows of the teacher that were known not counted"
        rows.append(("Time to evaluate", took))
    cost, rate = row.cost_in_teacher_evaluations, row.images_per_second
    if cost is not None:
        one = f"1 network evaluation, which takes as long as {cost:.2f} of the teacher's"
        rows.append(("A sample of the student", one))
    if rate is not None:
        rows.append(("Sampling", f"{rate:,.0f} images a second, on one actor"))
    return rows


def _duration(seconds: float | None) -> str:
    return _NOT_RECORDED if seconds is None else console.duration(seconds)


def settings_of(files: RunFiles) -> list[tuple[str, Facts]]:
    """Tables of settings: the trajectories' spec, the training, the evaluation."""
    groups = []
    if files.manifest is not None:
        spec = files.manifest.spec
        groups.append(
            (
                f"Spec of the trajectories, {files.manifest.spec_hash}",
                [(key, without_passwords(_plain(value))) for key, value in spec.items()],
            )
        )
    else:
        begun = files.begun
        if not begun.needs_trajectories:
            why = "training needs no trajectories"
        elif begun.training.online:
            why = "training makes the trajectories and does not keep them"
        else:
            why = "no finished trajectories were found"
        groups.append(("Spec of the trajectories", [("spec", why)]))
    training, student = _section(files, "training"), _section(files, "student")
    groups.append(
        (
            "Student and training",
            [(f"student.{key}", _plain(value)) for key, value in student.items()]
            + [(f"training.{key}", _plain(value)) for key, value in training.items() if value is not None],
        )
    )
    if files.metrics is not None:
        shown = (
            "protocol",
            "num_samples",
            "draws",
            "seeds",
            "precision",
            "reference",
            "feature_extractor",
            "checkpoint",
            "teacher",
            "decoder",
        )
        values = files.metrics.values()
        rows = [(key, without_passwords(_plain(values[key]))) for key in shown if values.get(key)]
        groups.append(("Evaluation", rows))
    return groups


def _plain(value: JsonValue) -> str:
    """A value as one line of YAML."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def versions_of(files: RunFiles) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per package, a column per stage; and device and code if they are recorded."""
    made = files.manifest.environment if files.manifest else None
    made_by: dict[str, Environment | ModelMeta | Metrics | None] = {
        "trajectories": made,
        "training": files.student,
        "evaluation": files.metrics,
    }
    known = {stage: found for stage, found in made_by.items() if found is not None and found.versions}
    packages = dict.fromkeys(name for found in known.values() for name in found.versions)
    rows = [[name, *(found.versions.get(name, "") for found in known.values())] for name in packages]
    if any(found.device for found in known.values()):
        rows.insert(0, ["device", *(found.device or "" for found in known.values())])
    if any(commits := [_commit(found.code) for found in known.values()]):
        rows.append(["commit", *commits])
    return ["package", *known], rows


def _commit(code: Code | None) -> str:
    if code is None or not code.commit:
        return ""
    return code.commit[:12] + (" with changes" if code.dirty else "")


def reproduction(files: RunFiles) -> tuple[str, str, str]:
    """The commands, the text of the config that they take, and the name to save it as.

    A finished student is made by `run`, from the config of the whole path.
    """
    begun = files.first or files
    config = config_values(begun.config)
    config |= {key: begun.trained_with[key] for key in TRAINED if key in begun.trained_with}
    text = without_passwords(dump_yaml(config, only_ascii=False))
    name = f"{begun.config.name}.yaml"
    made = ["gen-trajectories"] if files.begun.generates_trajectories else []
    stages = ["run", "report"] if files.first else [*made, "train", "eval", "report"]
    lines = [f"dsno-cluster {stage} {name}" for stage in stages]
    submitted = [run.record() for run in files.runs]
    if submitted:
        lines += ["", "# as it was submitted:"]
        lines += [f"# {without_passwords(record.command)}" for record in submitted]
    version = (files.metrics.versions if files.metrics else {}).get("dsno-cluster", __version__)
    return "\n".join([f"# dsno-cluster {version}", *lines]), text, name
