"""The command eval, and how metrics are shown in a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.commands.launching import launcher_and_profile, scripts_anyway, submit_stage
from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    from dsno_cluster.config import Config
    from dsno_cluster.evaluation.records import History, ImagesMetrics, Measurement, Metrics

Result = TypeVar("Result", bound="Metrics | ImagesMetrics | History")


@dataclass(frozen=True)
class Task(Generic[Result]):
    """What eval was asked for: in words, how it is `done` with so many actors on a Ray, and how its result is `shown`."""

    words: str
    done: Callable[[int | None, str | None], Result]
    shown: Callable[[Result], None]

    def here(self, actors: int | None, ray_address: str | None, as_json: bool) -> None:
        """Do it and show the result, or print it as JSON."""
        result = self.done(actors, ray_address)
        if as_json:
            print(json.dumps(result.values()))
        else:
            self.shown(result)


AnyTask = Task["Metrics"] | Task["ImagesMetrics"] | Task["History"]


def evaluate_student(arguments: Arguments) -> None:
    options = arguments.options
    given = [f"--{name}" for name in ("student", "samples", "watch") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: one at a time")
    config = _config(arguments)
    with scripts_anyway(arguments, config, ["eval"]):
        task = _task(arguments, config)  # what is missing is said before anything starts or is submitted
    launcher, profile = launcher_and_profile(arguments, "eval")
    if launcher == "slurm":
        if not options.dry_run:
            from dsno_cluster.evaluation.look_up import check_comparison

            check_comparison(config)
        submit_stage(arguments, config, profile, "eval")
        if options.wait and not (options.dry_run or options.json or options.samples or options.watch):
            show_metrics(written_metrics(config))
        return
    if options.dry_run:
        from dsno_cluster.cluster.ray_pool import actor_count

        text = (
            f"would evaluate {task.words}, metrics {', '.join(config.evaluation.metrics)}, "
            f"{actor_count(options.actors, config.evaluation.threads)}"
        )
        print(json.dumps({"dry_run": text}) if options.json else text)
        return
    task.here(options.actors, options.ray_address, options.json)


def _config(arguments: Arguments) -> Config:
    """The experiment; with --watch it may be named by a run of its training."""
    if not arguments.options.watch:
        return arguments.config()
    from dsno_cluster.cluster.runs import config_of_run

    return config_of_run(arguments.run_word(), arguments.overrides)


def _task(arguments: Arguments, config: Config) -> AnyTask:
    """What is to be evaluated. Raises UserError if it is missing."""
    options, settings = arguments.options, config.evaluation
    if options.watch:
        from dsno_cluster.evaluation.watch import watch
        from dsno_cluster.teachers import find_teacher

        words = f"each checkpoint of {config.name} with {settings.num_samples} samples"
        return Task(words, partial(watch, config, find_teacher(config)), partial(show_history, config))
    from dsno_cluster.evaluation.evaluate import evaluate, evaluate_images

    if options.samples:
        from dsno_cluster.evaluation.image_sets import open_images

        images = open_images(options.samples, config.storage.endpoint_url)
        options.samples = images.address  # for a job that starts in another folder
        words = f"{images.count} images of {options.samples}"
        return Task(words, partial(evaluate_images, config, options.samples), show_figures)
    from dsno_cluster.evaluation.look_up import find_subject

    subject = find_subject(config, options.student)
    words = f"{subject.student.address} with {settings.num_samples} samples"
    return Task(words, partial(evaluate, subject), show_metrics)


def written_metrics(config: Config) -> Metrics:
    """What the newest evaluation of an experiment's student wrote. Raises UserError if there is none."""
    from dsno_cluster.evaluation.records import Metrics, read_file
    from dsno_cluster.storage import open_storage

    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    key = f"evaluation/{config.name}/metrics.json"
    found = read_file(Metrics, storage, key)
    if found is None:
        raise UserError(f"{storage.url}/{key}: is missing; `dsno-cluster eval` makes it")
    return found


def show_metrics(metrics: Metrics) -> None:
    from dsno_cluster import console
    from dsno_cluster.evaluation.table import error_lines, figures_of, table_rows

    if figures_of(metrics):
        count, extractor = metrics.num_samples, metrics.feature_extractor.name
        console.table(f"{count} samples, {extractor}", *table_rows(metrics))
    else:
        cost = metrics.student.cost_in_teacher_evaluations
        print(f"cost of a sample: {cost:.1f} evaluations of the teacher")
    lines = error_lines(metrics)
    if lines:
        print("relative error of the student's trajectory on held-out noise: " + ", ".join(lines))
    _show_warnings(metrics)


def show_figures(metrics: ImagesMetrics) -> None:
    """The figures of images that were there."""
    from dsno_cluster import console
    from dsno_cluster.evaluation.table import known_figures

    extractor, figures = metrics.feature_extractor.name, metrics.figures
    title = f"{metrics.num_samples} images of {metrics.samples.address}, {extractor}"
    rows = [
        [figure.title, figure.text(figures)] for figure in known_figures(extractor) if figure.text(figures)
    ]
    console.table(title, ["figure", "value"], rows)
    _show_warnings(metrics)


def show_history(config: Config, history: History) -> None:
    """What was measured of each checkpoint."""
    from dsno_cluster import console
    from dsno_cluster.evaluation.history import judging_figures, value_of

    known = judging_figures(config.evaluation.feature_extractor)
    shown = {
        metric: figure.title
        for metric, figure in known.items()
        if any(value_of(row, metric) is not None for row in history.rows)
    }

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    rows = [
        [str(row.step), cell(row.ema_decay), *(cell(value_of(row, metric)) for metric in shown)]
        for row in history.rows
    ]
    console.table("checkpoints", ["step", "average", *shown.values()], rows)


def _show_warnings(metrics: Measurement) -> None:
    for warning in metrics.warnings:
        print(f"note: {warning}")
