"""What the report says in words and tables: what the run is, what it cost, its settings, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from dsno_cluster import __version__, console
from dsno_cluster.errors import without_passwords
from dsno_cluster.report.run_files import RunFiles
from dsno_cluster.trajectories.plan import bytes_text
from dsno_cluster.trajectories.shards import canonical_hash

# what a student's own config must agree in with the config that is reported
TRAINED = ("seed", "data", "network", "teacher", "trajectories", "student", "training")
# keys that a training is watched and kept by: they leave the student as it is
WATCHED = {
    f"training.{key}"
    for key in (
        "log_every",
        "tensorboard",
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
    """What the run is, in a sentence or two."""
    config, student = files.config, files.student
    text = f"A DSNO student of the teacher {config.teacher.path or 'that is not named'}"
    step = _newest_step(files)
    if step is not None:
        text += f", trained to step {step:,} of {_trained(files, 'training', 'steps'):,}"
    samples = files.manifest.num_samples if files.manifest else config.trajectories.num_samples
    text += f" on {samples:,} trajectories of {files.size.evaluations_per_sample} evaluations each."
    evaluated = ((files.metrics or {}).get("checkpoint") or {}).get("step")
    if evaluated is not None:
        text += f" Evaluated at step {evaluated:,}."
    elif student is None and files.metrics is None:
        text += " No student is published yet."
    return text


def warnings_of(files: RunFiles) -> list[str]:
    """What eval warns of, and an evaluation that is older than the newest student."""
    metrics = files.metrics or {}
    found = [str(line) for line in metrics.get("warnings") or []]
    evaluated, newest = (metrics.get("checkpoint") or {}).get("step"), (files.student or {}).get("step")
    if evaluated is not None and newest is not None and evaluated < newest:
        found.append(f"The evaluation is of step {evaluated:,}; the newest student is of step {newest:,}.")
    return found


def differences(files: RunFiles, most: int = 6) -> list[str]:
    """Keys that were changed while the student was trained, and those in which the reported config is not the student's."""
    ours = dict(_flat(files.config.model_dump(mode="json", include=set(TRAINED))))
    theirs = dict(_flat({key: files.trained_with[key] for key in TRAINED if key in files.trained_with}))
    found = [
        f"{key} is {_plain(ours[key])} in the config of this report; the student was trained with {_plain(theirs[key])}."
        for key in ours
        if key in theirs and key not in WATCHED and not _same(ours[key], theirs[key])
    ]
    more = [f"{len(found) - most} more keys differ."] if len(found) > most else []
    changed = [
        f"{change['key']} was {_plain(change['before'])} until step {change['step']:,} of the training, then "
        f"{_plain(change['after'])}."
        for change in (files.student or {}).get("changes", [])
    ]
    return changed + found[:most] + more


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, str) and isinstance(theirs, str):  # a submitted run has made its paths absolute
        return ours == theirs or ours.endswith("/" + theirs) or theirs.endswith("/" + ours)
    return bool(ours == theirs)


def _trained(files: RunFiles, section: str, key: str) -> Any:
    """A setting that the student was trained with, or that of the config."""
    settings = files.config.model_dump(mode="json")
    return (files.trained_with.get(section) or settings[section]).get(key, settings[section][key])


def _newest_step(files: RunFiles) -> int | None:
    steps = [int(line["step"]) for line in files.curve[-1:]]
    published = (files.student or {}).get("step")
    return max([*steps, *([] if published is None else [int(published)])], default=None)


def cost_of(files: RunFiles) -> Facts:
    """Evaluations, seconds and bytes, by stage."""
    size, manifest, metrics = files.size, files.manifest, files.metrics
    count = manifest.num_samples if manifest else size.num_samples
    rows = [
        (
            "Trajectories",
            f"{count:,}"
            + ("" if manifest else " planned; none are finished at " + files.config.storage.root),
        ),
        (
            "Evaluations of the teacher",
            f"{size.evaluations_per_sample:,} each, {count * size.evaluations_per_sample:,} in all",
        ),
    ]
    if manifest:
        held = sum(shard.size for shard in manifest.shards)
        rows.append(("Their size", f"{bytes_text(held)} ({held:,} bytes) in {len(manifest.shards):,} shards"))
        rows.append(("Time to make them", _seconds(manifest.environment.get("seconds"))))
    last = files.curve[-1] if files.curve else {}
    seconds = last.get(
        "seconds", (files.student or {}).get("train_seconds", (metrics or {}).get("train_seconds"))
    )
    step = _newest_step(files)
    if step is not None:
        images = step * _trained(files, "training", "batch_size")
        rows.append(("Training", f"{step:,} steps, {images:,} trajectories seen"))
        rows.append(("Time to train", _seconds(seconds)))
        ranks = (files.student or {}).get("world_size")
        if ranks is not None:
            rows.append(("Training processes", str(ranks)))
    if last.get("images_per_second") is not None:
        rate = f"{last['images_per_second']:,.0f} a second"
        if last.get("data_wait") is not None:
            rate += f"; {last['data_wait']:.1%} of the time waiting for data"
        rows.append(("Trajectories trained on", rate))
    if last.get("memory_gb") is not None:
        rows.append(("Most memory of a process", f"{last['memory_gb']:.2f} GB"))
    if (took := (metrics or {}).get("seconds")) is not None:
        rows.append(
            ("Time to evaluate", _seconds(took) + ", rows of the teacher that were known not counted")
        )
    student = (metrics or {}).get("student", {})
    if "cost_in_teacher_evaluations" in student:
        rows.append(
            (
                "A sample of the student",
                f"1 network evaluation, which takes as long as {student['cost_in_teacher_evaluations']:.2f} of the teacher's",
            )
        )
    if "images_per_second" in student:
        rows.append(("Sampling", f"{student['images_per_second']:,.0f} images a second, on one actor"))
    return rows


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return _NOT_RECORDED
    return f"{seconds:,.0f} s" + (f" ({console.duration(seconds)})" if seconds >= 120 else "")


def settings_of(files: RunFiles) -> list[tuple[str, Facts]]:
    """Tables of settings: the trajectories' spec, the training, the evaluation."""
    groups = []
    if files.manifest is not None:
        spec = files.manifest.spec
        groups.append(
            (
                f"Spec of the trajectories, {canonical_hash(spec)}",
                [(key, without_passwords(_plain(value))) for key, value in spec.items()],
            )
        )
    else:
        groups.append(("Spec of the trajectories", [("spec", "no finished trajectories were found")]))
    config = files.config.model_dump(mode="json")
    training = files.trained_with.get("training") or config["training"]
    student = files.trained_with.get("student") or config["student"]
    groups.append(
        (
            "Student and training",
            [(f"student.{key}", _plain(value)) for key, value in student.items()]
            + [(f"training.{key}", _plain(value)) for key, value in training.items() if value is not None],
        )
    )
    if files.metrics is not None:
        shown = (
            "num_samples",
            "seeds",
            "precision",
            "reference",
            "feature_extractor",
            "checkpoint",
            "teacher",
        )
        rows = [
            (key, without_passwords(_plain(files.metrics[key]))) for key in shown if files.metrics.get(key)
        ]
        groups.append(("Evaluation", rows))
    return groups


def _plain(value: Any) -> str:
    """A value as YAML would write it in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def versions_of(files: RunFiles) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a package a row, a stage a column; and the device and code where they are recorded."""
    made_by: dict[str, dict[str, Any]] = {
        "trajectories": files.manifest.environment if files.manifest else {},
        "training": files.student or {},
        "evaluation": files.metrics or {},
    }
    known = {stage: found["versions"] for stage, found in made_by.items() if found.get("versions")}
    packages = dict.fromkeys(name for found in known.values() for name in found)
    rows = [[name, *(str(found.get(name, "")) for found in known.values())] for name in packages]
    if any(made_by[stage].get("device") for stage in known):
        rows.insert(0, ["device", *(str(made_by[stage].get("device") or "") for stage in known)])
    if any(commits := [_commit(made_by[stage].get("code") or {}) for stage in known]):
        rows.append(["commit", *commits])
    return ["package", *known], rows


def _commit(code: dict[str, Any]) -> str:
    commit = code.get("commit")
    return "" if not commit else commit[:12] + (" with changes" if code.get("dirty") else "")


def reproduction(files: RunFiles) -> tuple[str, str, str]:
    """The commands, the text of the config that they take, and the name to save it as."""
    config = files.config.model_dump(mode="json")
    config |= {key: files.trained_with[key] for key in TRAINED if key in files.trained_with}
    text = without_passwords(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    name = f"{files.config.name}.yaml"
    stages = ("gen-trajectories", "train", "eval", "report")
    lines = [f"dsno-cluster {stage} {name}" for stage in stages]
    submitted = [run.record() for run in files.runs]
    if submitted:
        lines += ["", "# as it was submitted:"]
        lines += [f"# {without_passwords(record.command)}" for record in submitted]
    version = ((files.metrics or {}).get("versions") or {}).get("dsno-cluster", __version__)
    return "\n".join([f"# dsno-cluster {version}", *lines]), text, name
