"""The charts of the report: their series, axes and summaries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dsno_cluster.evaluation.history import best_row, judging_figures, text_of, value_of
from dsno_cluster.evaluation.records import Figures, History, Metrics
from dsno_cluster.evaluation.table import Figure
from dsno_cluster.report.charts import Chart, Series, averaged, number
from dsno_cluster.report.run_files import CurveLine

Point = tuple[float, float]
STUDENT, TEACHER = 0, 1  # colours of the page


def cost_chart(metrics: Metrics, figure: Figure) -> Chart | None:
    """A figure of the samples against their cost: the teacher at several costs, and the student.

    None without either, or for a figure that does not rank them.
    """
    student = metrics.student
    value, cost = _finite(student.figure(figure.key)), student.cost_in_teacher_evaluations
    if value is None or cost is None or figure.better == "as real":
        return None
    by_solver: dict[str, list[Point]] = {}
    spreads: dict[str, dict[float, float]] = {}
    for row in metrics.teacher_rows:
        if (theirs := _finite(row.figure(figure.key))) is not None:
            by_solver.setdefault(row.source, []).append((row.evaluations, theirs))
            spreads.setdefault(row.source, {}).update(_spread(row.evaluations, row, figure))
    ours = (cost, value)
    series = [
        Series(name, sorted(points), TEACHER + i, dots=len(points) == 1, spreads=spreads[name])
        for i, (name, points) in enumerate(by_solver.items())
    ]
    spread = _spread(cost, student, figure)
    series.append(Series("student", [ours], STUDENT, dots=True, loud=True, spreads=spread))
    levels = []
    held_out = metrics.real_held_out
    if held_out and (real := _finite(held_out.figure(figure.key))) is not None:
        levels.append(("real, held out", real))
    at = [(cost, value) for points in by_solver.values() for cost, value in points]
    if figure.better == "lower":
        needed = min((cost for cost, value in at if value <= ours[1]), default=None)
    else:
        needed = min((cost for cost, value in at if value >= ours[1]), default=None)
    rival = (
        "none of the teacher's rows is as good"
        if needed is None
        else f"the teacher is as good from {number(needed)} evaluations on"
    )
    return Chart(
        title=f"{figure.title} by cost of an image",
        x="cost of an image, in evaluations of the teacher",
        y=f"{figure.title} ({figure.better} is better)",
        series=series,
        levels=levels,
        log_x=True,
        log_y=figure.better == "lower",
        summary=f"The student has {number_of(figure, student)} at a cost of {ours[0]:.1f}; {rival}.",
    )


def number_of(figure: Figure, row: Figures) -> str:
    return f"{figure.title} {figure.text(row)}"


def loss_chart(curve: Sequence[CurveLine], title: str = "Training loss") -> Chart | None:
    points = _points((line.step, line.loss) for line in curve)
    if not points:
        return None
    return Chart(
        title=title,
        x="step",
        y="weighted loss of a batch",
        series=[Series("loss", points, STUDENT)],
        log_y=True,
        summary=_fall("The loss", points),
    )


def heldout_chart(curve: Sequence[CurveLine], times: Sequence[float]) -> Chart | None:
    """Relative error by time point during training, on noise that training never sees."""
    series = []
    for i, time in enumerate(times):
        measured = [line for line in curve if len(line.heldout_error_per_time) > i]
        points = _points((line.step, line.heldout_error_per_time[i]) for line in measured)
        if points:
            series.append(Series(f"t = {time:.4g}", points, i))
    if not series:
        return None
    last = "; ".join(f"{s.name}: {number_3(s.points[-1][1])}" for s in series)
    return Chart(
        title="Held-out error by time point",
        x="step",
        y="relative error against the teacher",
        series=series,
        log_y=True,
        summary=f"At step {number(series[0].points[-1][0])}: {last}.",
    )


def distance_chart(curve: Sequence[CurveLine], extractor: str) -> Chart | None:
    """The distance of samples from real images during training, on noise that neither training nor `eval` sees."""
    points = _points((line.step, line.heldout_distance) for line in curve)
    if not points:
        return None
    title = judging_figures(extractor)["fid"].title
    step, lowest = min(points, key=lambda point: point[1])
    best = f" It is lowest at step {number(step)}, with {number_3(lowest)}." if len(points) > 1 else ""
    return Chart(
        title=f"Held-out {title} during training",
        x="step",
        y=f"{title} (lower is better)",
        series=[Series("student", points, STUDENT)],
        log_y=True,
        summary=_fall("The distance", points) + best,
    )


def history_figures(history: History, extractor: str) -> list[Figure]:
    """The figures of a history to draw: the distance, and the one that chooses the best."""
    known = judging_figures(extractor)
    chosen_by = history.best.metric if history.best else "fid"
    return [known[metric] for metric in dict.fromkeys(["fid", chosen_by]) if metric in known]


def history_chart(history: History, figure: Figure, level: tuple[str, float] | None) -> Chart | None:
    """A figure of each evaluated checkpoint by its step, a line for each moving average.

    It shows only rows that were evaluated with the same settings as the best.
    """
    settings = best_row(history).evaluation if history.rows else None
    rows = [row for row in history.rows if row.evaluation == settings]
    decays = sorted({row.ema_decay for row in rows}, key=lambda decay: (decay is None, decay or 0.0))
    series = []
    for i, decay in enumerate(decays):
        points = _points((row.step, value_of(row, figure.key)) for row in rows if row.ema_decay == decay)
        if points:
            of_line = [row for row in rows if row.ema_decay == decay]
            spreads = {x: half for row in of_line for x, half in _spread(row.step, row, figure).items()}
            name = "student" if decay is None else f"EMA {decay:g}"
            series.append(Series(name, points, i if i == 0 else i + 1, spreads=spreads))
    if not series:
        return None
    choose = min if figure.better == "lower" else max
    measured = [(row, value) for row in rows if (value := _finite(value_of(row, figure.key))) is not None]
    best, _ = choose(measured, key=lambda found: found[1])
    of = f" (EMA {best.ema_decay:g})" if len(series) > 1 and best.ema_decay is not None else ""
    return Chart(
        title=f"{figure.title} against step",
        x="step",
        y=f"{figure.title} ({figure.better} is better)",
        series=series,
        levels=[level] if level else [],
        log_y=figure.better == "lower",
        summary=f"Best so far: {text_of(best, figure.key, figure)} at step {number(best.step)}{of}.",
    )


def chart_table(chart: Chart, most: int = 25) -> tuple[list[str], list[list[str]]]:
    """The chart's figures as a table by x; long lines as the means of `most` parts."""
    columns = [(s.name, dict(averaged(s.points, most))) for s in chart.series]
    xs = sorted({x for _, points in columns for x in points})
    header = [chart.x, *(name for name, _ in columns)]
    rows = [[number(x), *(number_3(points[x]) if x in points else "" for _, points in columns)] for x in xs]
    return header, rows


def number_3(value: float) -> str:
    """A number with three significant digits, such as 0.0123 or 45.6."""
    return f"{value:.3g}" if abs(value) < 1000 else number(value)


def _points(pairs: Iterable[tuple[float, float | None]]) -> list[Point]:
    """The pairs that can be drawn, by x; each x once, with the last of its values."""
    finite = {float(x): value for x, y in pairs if (value := _finite(y)) is not None}
    return sorted(finite.items())


def _spread(x: float, row: Figures, figure: Figure) -> dict[float, float]:
    """By x, how far the interval of a row's figure reaches on either side of it; empty if it has none."""
    half = _finite(row.figure(f"{figure.key}_ci95"))
    return {} if half is None else {x: half}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _fall(what: str, points: Sequence[Point]) -> str:
    first, last = points[0], points[-1]
    if len(points) == 1:
        return f"{what} is {number_3(first[1])} at step {number(first[0])}, the only one recorded."
    word = "falls" if last[1] < first[1] else "goes"
    return (
        f"{what} {word} from {number_3(first[1])} at step {number(first[0])} "
        f"to {number_3(last[1])} at step {number(last[0])}."
    )
