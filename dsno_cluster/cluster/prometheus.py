"""The progress of a stage as a text file of metrics, `<run.dir>/prometheus/<name>-<stage>.prom`, for Prometheus.

The textfile collector of a node exporter reads such files. A file is replaced when there is progress, at
most every two seconds, by the process that shows it, and keeps its last state when the stage has ended. Each
task of an array has a file of its own, `<name>-<stage>-<task>.prom`, counted from 0.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsno_cluster import console
from dsno_cluster.files import replace_file

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from dsno_cluster.config import Config

FOLDER, SUFFIX = "prometheus", ".prom"
_STATE, _BEGAN, _WRITTEN, _REMAINING = (
    "dsno_stage_state",
    "dsno_stage_start_timestamp_seconds",
    "dsno_stage_progress_timestamp_seconds",
    "dsno_stage_remaining_seconds",
)
# what was before what, without a clock: clocks of hosts may differ
_BEGAN_ORDER, _STATE_ORDER = "dsno_stage_start_order", "dsno_stage_state_order"
STATES = ("running", "done", "failed", "interrupted")
# progress, by its unit: the metric that counts it, and what it counts
UNITS = {
    "trajectories": ("dsno_trajectories", "Trajectories solved"),
    "steps": ("dsno_training_steps", "Optimiser steps"),
    "samples": ("dsno_evaluation_samples", "Samples and images measured by this evaluation"),
}
# figures that the work records: metric, type, meaning. A list of numbers has one for each time point, the label `point`
FIGURES = {
    "shards": ("dsno_shards", "counter", "Shards made"),
    "shards_planned": ("dsno_shards_planned", "gauge", "Shards that there will be"),
    "trajectories_per_second": ("dsno_trajectories_per_second", "gauge", "Trajectories solved per second, since this start"),
    "loss": ("dsno_training_loss", "gauge", "What the last step minimised"),
    "lr": ("dsno_training_learning_rate", "gauge", "Learning rate of the last step"),
    "images_per_second": ("dsno_training_images_per_second", "gauge", "Trajectories trained on per second"),
    "seconds": ("dsno_training_seconds", "counter", "Time of training, over all resumptions"),
    "heldout_error_per_time": (
        "dsno_training_heldout_error_ratio",
        "gauge",
        "Relative error of the student's trajectory on held-out noise, when last measured, by time point",
    ),
    "heldout_distance": (
        "dsno_training_heldout_frechet_distance",
        "gauge",
        "Frechet distance of samples from held-out images, when last measured",
    ),
}  # fmt: skip


def progress_file(config: Config, stage: str, task: int | None = None) -> Path:
    """Where a stage of an experiment, or a task of its array, writes its metrics."""
    of_task = "" if task is None else f"-{task}"
    return config.run_dir / FOLDER / f"{config.name}-{stage}{of_task}{SUFFIX}"


@contextlib.contextmanager
def progress_exported(config: Config, stage: str, task: int | None = None) -> Iterator[None]:
    """In this context the progress of this process is in `progress_file`, and in the end how the work ended.

    A process that shows no progress writes nothing, such as a rank other than 0, or a start that finds the work done:
    then only another state that an earlier start left becomes `done`.
    """
    export = _Export(config, stage, task)
    state = "failed"
    try:
        with console.recording(export.take):
            yield
        state = "done"
    except (KeyboardInterrupt, SystemExit):
        state = "interrupted"
        raise
    finally:
        # a full disk is reported by the work itself
        with contextlib.suppress(OSError):
            export.end(state)


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is: `done` of `planned` in its `unit`, None before any was counted.

    `order`: of its state among the starts and ends of all stages, of which a later one has a larger number; `began`: that
    of its last start; 0 in files of older versions. `remaining`: seconds until that work is done, if known. `written`: when,
    in seconds of the epoch by the clock of its host; `modified` is that of the file system, in nanoseconds.
    """

    state: str
    unit: str
    done: int | None
    planned: int | None
    remaining: float | None
    began: int
    order: int
    written: float
    modified: int


def read_progress(config: Config, stage: str) -> StageProgress | None:
    """What the `progress_file` of a stage says; None if there is none that can be read.

    Of several, as the tasks of an array have them, the file counts that says `done`, unless a task began after that;
    else the one that was modified last.
    """
    whole = progress_file(config, stage)
    names = re.compile(re.escape(whole.stem) + r"(-\d+)?" + re.escape(whole.suffix))
    try:
        files = [file for file in whole.parent.iterdir() if names.fullmatch(file.name)]
    except OSError:
        return None
    found = [progress for file in files if (progress := _read(file)) is not None]
    begun = max((progress.began for progress in found), default=0)
    ended = [progress for progress in found if progress.state == "done" and progress.order >= begun]
    return max(ended or found, key=lambda progress: progress.modified, default=None)


def _read(file: Path) -> StageProgress | None:
    from prometheus_client.parser import text_string_to_metric_families

    try:
        modified = file.stat().st_mtime_ns
        samples = [s for family in text_string_to_metric_families(file.read_text()) for s in family.samples]
    except (OSError, ValueError):
        return None
    values = {sample.name: sample.value for sample in samples if sample.name != _STATE}
    states = [s.labels.get("state", "") for s in samples if s.name == _STATE and s.value == 1]
    if not states or _WRITTEN not in values:
        return None
    counted = next(((unit, name) for unit, (name, _) in UNITS.items() if f"{name}_total" in values), None)
    unit, name = counted or ("", "")
    return StageProgress(
        state=states[0],
        unit=unit,
        done=int(values[f"{name}_total"]) if counted else None,
        planned=int(values[f"{name}_planned"]) if counted else None,
        remaining=values.get(_REMAINING),
        began=int(values.get(_BEGAN_ORDER, 0)),
        order=int(values.get(_STATE_ORDER, 0)),
        written=values[_WRITTEN],
        modified=modified,
    )


def _next_order(folder: Path) -> int:
    """The number of a start or end that is now: above those of all others that the files in a folder have."""
    number = re.compile(rf"^(?:{_BEGAN_ORDER}|{_STATE_ORDER}){{.*}} (\S+)$", re.MULTILINE)
    known, files = [0], []
    with contextlib.suppress(OSError):  # no work ends because of its metrics
        files = [file for file in folder.iterdir() if file.suffix == SUFFIX]
    for file in files:
        with contextlib.suppress(OSError, ValueError, OverflowError):  # not readable, or damaged
            known += [int(float(found)) for found in number.findall(file.read_text())]
    return max(known) + 1


class _Export:
    def __init__(self, config: Config, stage: str, task: int | None) -> None:
        self.config, self.stage, self.file = config, stage, progress_file(config, stage, task)
        self.labels = {"run": config.name, "stage": stage} | ({} if task is None else {"task": str(task)})
        self.began, self.began_order = time.time(), _next_order(self.file.parent)
        self.metrics: dict[str, Metric] = {}
        self.before = self._content()

    def take(self, tally: console.Tally) -> None:
        if tally.unit in UNITS:
            metric, what = UNITS[tally.unit]
            self._set(metric, "counter", what, tally.done)
            self._set(f"{metric}_planned", "gauge", f"{what}, in the end", tally.total)
        if tally.rate > 0:
            seconds = (tally.total - tally.done) / tally.rate
            self._set(_REMAINING, "gauge", "Until this work is done, by its rate since this start", seconds)
        for name, value in tally.recorded.items():
            self._set(*FIGURES[name], value)
        self._set_beginning()
        self._set_order(self.began_order)
        self._set(_WRITTEN, "gauge", "When its progress was last written", time.time())
        self._write("running")

    def end(self, state: str) -> None:
        """Write the last state, if any progress was written before: by this start, or by an earlier one if the work is done.

        What was done already stays as it is: done anew, it would make what was done after it look outdated.
        """
        if not self.metrics and state == "done" and self.before and self._content() == self.before:
            if self._was_done():
                return
            self.metrics = _metrics_of(self.before)
        if self.metrics:
            self._set_beginning()
            self._set_order(_next_order(self.file.parent))
            self._write(state)

    def _was_done(self) -> bool:
        """Whether the file says so, and no other task of an array began after that."""
        found = _read(self.file), read_progress(self.config, self.stage)
        return all(progress is not None and progress.state == "done" for progress in found)

    def _content(self) -> str:
        """What the file holds, empty if it cannot be read. Another process of this start may replace it."""
        try:
            return self.file.read_text()
        except (OSError, ValueError):
            return ""

    def _set_beginning(self) -> None:
        self._set(_BEGAN, "gauge", "When this start of the stage began", self.began)
        self._set(
            _BEGAN_ORDER,
            "gauge",
            "Number of this start among the starts and ends of stages",
            self.began_order,
        )

    def _set_order(self, order: int) -> None:
        self._set(
            _STATE_ORDER, "gauge", "Number of the start or end since which the state is as it is", order
        )

    def _set(self, name: str, kind: str, meaning: str, value: console.Figure) -> None:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        points = (
            [("", value)] if isinstance(value, (int, float)) else [(str(i), v) for i, v in enumerate(value)]
        )
        names = [*self.labels, *(["point"] if points[0][0] else [])]
        metric = family(name, meaning, labels=names)
        for point, number in points:
            metric.add_metric([*self.labels.values(), *([point] if point else [])], number)
        self.metrics[name] = metric

    def _write(self, state: str) -> None:
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(_Collected([*self.metrics.values(), self._state(state)]))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.file, generate_latest(registry))

    def _state(self, state: str) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        metric = GaugeMetricFamily(
            _STATE, "1 for the state that the stage is in", labels=[*self.labels, "state"]
        )
        for each in STATES:
            metric.add_metric([*self.labels.values(), each], float(each == state))
        return metric


def _metrics_of(text: str) -> dict[str, Metric]:
    """The metrics in a file's text besides the state, by name; none if it cannot be read."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        return {m.name: m for m in text_string_to_metric_families(text) if m.name != _STATE}
    except ValueError:
        return {}


@dataclass(eq=False)
class _Collected:
    """What a registry asks for its metrics."""

    metrics: list[Metric]

    def collect(self) -> list[Metric]:
        return self.metrics
