"""The command eval, and the display of metrics in a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.commands.launching import run_stage
from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    from dsno_cluster.config import Config
    from dsno_cluster.evaluation.records import History, ImagesMetrics, Measurement, Metrics


def evaluate_student(arguments: Arguments) -> None:
    from dsno_cluster.stages import EVAL

    options = arguments.options
    given = [f"--{name}" for name in ("student", "samples", "watch") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: one at a time")
    config = _config(arguments)
    chosen = EVAL.options(
        actors=options.actors,
        gpus_per_actor=options.gpus_per_actor,
        student=options.student,
        samples=_samples(arguments, config),
        watch=options.watch,
    )
    result = run_stage(arguments, EVAL, config, chosen)
    if result is None:
        return
    if options.json:
        if result.details is not None:
            print(json.dumps(result.details.values()))
    elif options.watch or options.samples:
        if result.details is not None:
            show = partial(show_history, config) if options.watch else show_figures
            show(result.details)
    else:
        show_metrics(result.details or written_metrics(config))


def _config(arguments: Arguments) -> Config:
    """The experiment; with --watch it may be named by a run of its training."""
    if not arguments.options.watch:
        return arguments.config()
    from dsno_cluster.cluster.runs import config_of_run

    return config_of_run(arguments.run_word(), arguments.overrides)


def _samples(arguments: Arguments, config: Config) -> str | None:
    """The address of --samples, for a job that may start in another folder. Raises UserError if there are no images."""
    if not arguments.options.samples:
        return None
    from dsno_cluster.image_sets.opening import open_images

    return open_images(arguments.options.samples, config.storage.endpoint_url, config.data).address


def written_metrics(config: Config) -> Metrics:
    """The metrics of the newest evaluation of an experiment's student. Raises UserError if there is none."""
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
    from dsno_cluster.evaluation.table import (
        all_rows,
        conditions,
        error_lines,
        figures_of,
        spread_notes,
        table_rows,
    )

    if figures := figures_of(metrics):
        console.table(f"{metrics.num_samples} samples, {conditions(metrics)}", *table_rows(metrics))
        _print_lines(spread_notes(figures, all_rows(metrics)))
    elif (cost := metrics.student.cost_in_teacher_evaluations) is not None:
        print(f"cost of a sample: {cost:.1f} evaluations of the teacher")
    lines = error_lines(metrics)
    if lines:
        change = ", before -> after finishing" if metrics.before else ""
        print(f"relative error of the student's trajectory on held-out noise{change}: " + ", ".join(lines))
    _show_warnings(metrics)


def show_figures(metrics: ImagesMetrics) -> None:
    """Show the figures of existing images."""
    from dsno_cluster import console
    from dsno_cluster.evaluation.table import conditions, known_figures, spread_notes

    extractor, figures = metrics.feature_extractor.name, metrics.figures
    title = f"{metrics.num_samples} images of {metrics.samples.address}, {conditions(metrics)}"
    shown = [figure for figure in known_figures(extractor) if figure.text(figures)]
    console.table(title, ["figure", "value"], [[figure.title, figure.text(figures)] for figure in shown])
    _print_lines(spread_notes(shown, [figures]))
    _show_warnings(metrics)


def show_history(config: Config, history: History) -> None:
    """Show the figures of each checkpoint."""
    from dsno_cluster import console
    from dsno_cluster.evaluation.history import judging_figures, text_of, value_of
    from dsno_cluster.evaluation.table import spread_notes

    known = judging_figures(config.evaluation.feature_extractor)
    shown = {
        metric: figure
        for metric, figure in known.items()
        if any(value_of(row, metric) is not None for row in history.rows)
    }

    rows = [
        [
            str(row.step),
            "" if row.ema_decay is None else f"{row.ema_decay:g}",
            *(text_of(row, metric, figure) for metric, figure in shown.items()),
        ]
        for row in history.rows
    ]
    console.table("checkpoints", ["step", "average", *(figure.title for figure in shown.values())], rows)
    _print_lines(spread_notes(list(shown.values()), history.rows))


def _show_warnings(metrics: Measurement) -> None:
    _print_lines([f"note: {warning}" for warning in metrics.warnings])


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
