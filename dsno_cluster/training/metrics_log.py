"""The log of a training: lines of metrics.jsonl, pictures, and what trackers get of both."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.errors import WorkError
from dsno_cluster.model_folder import step_name
from dsno_cluster.records import SparseRecord
from dsno_cluster.storage import FolderStorage
from dsno_cluster.training.trackers import open_trackers


class MetricsLine(SparseRecord):
    """A line of metrics.jsonl: figures after optimiser step `step`."""

    step: int
    loss: float
    lr: float
    seconds: float  # of training so far, over all resumptions
    distance_per_time: tuple[
        float | None, ...
    ]  # None at time points that the step did not see; empty without trajectories
    images_per_second: float
    data_wait: float  # share of the time in which the network waited for data
    memory_gb: float
    loss_scale: float | None = None  # of float16
    heldout_error_per_time: tuple[float, ...] | None = None
    figures: dict[str, float] | None = None  # of other objectives than trajectories, by name
    heldout_distance: float | None = None  # Frechet distance of held-out samples from real images


def metrics_file(config: Config) -> Path:
    return config.run_dir / config.student_prefix / "metrics.jsonl"


def trim_metrics(config: Config, step: int) -> None:
    """Drop lines after `step`, which a resumed run writes again, and one that a crash truncated."""
    file = metrics_file(config)
    lines = file.read_text().splitlines() if file.is_file() else []
    kept = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    FolderStorage(file.parent).write(file.name, "".join(kept).encode())


class MetricsLog:
    """Appends lines to metrics.jsonl, and hands their figures to the trackers that the config asks for.

    A context manager: it closes the trackers.
    """

    def __init__(self, config: Config, start: int) -> None:
        self.file = metrics_file(config)
        trim_metrics(config, start)
        self.trackers = open_trackers(config, self.file.parent, start)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.ExitStack() as all_of_them:  # also after one that raises
            for tracker in reversed(self.trackers):
                all_of_them.callback(tracker.close, failed=kind is not None)

    def write(self, line: MetricsLine) -> None:
        try:
            with self.file.open("a") as file:
                file.write(json.dumps(line.values()) + "\n")
        except OSError as error:
            raise WorkError(f"{self.file}: cannot be written: {error.strerror}") from error
        numbers: dict[str, float] = {}
        for name, value in line.values().items():
            if name not in ("schema_version", "step"):
                numbers |= _numbers(name, value)
        for tracker in self.trackers:
            tracker.figures(line.step, numbers)

    def picture(self, step: int, png: bytes, images_NCHW: Tensor) -> None:
        """Write samples from fixed noise to `samples/step-000001000.png` beside metrics.jsonl."""
        FolderStorage(self.file.parent / "samples").write(f"{step_name(step)}.png", png)
        for tracker in self.trackers:
            tracker.images(step, images_NCHW)


def _numbers(name: str, value: Any) -> dict[str, float]:
    """The numbers of a figure by name: one for each time point or part that has a number."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {f"{name}/{part}": number for part, number in value.items() if number is not None}
    return {} if value is None else {name: value}
