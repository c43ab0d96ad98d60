"""The charts of the report: which series, which axes, and what they show in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from dsno_cluster.evaluation.history import judging_figures, value_of
from dsno_cluster.evaluation.table import Figure
from dsno_cluster.report.charts import Chart, Series, averaged, number
from dsno_cluster.report.run_files import best_row

Point = tuple[float, float]
STUDENT, TEACHER = 0, 1  # colours of the page


def cost_chart(metrics: dict[str, Any], figure: Figure) -> Chart | None:
    """A figure of the samples over what they cost: the teacher at several, and the student."""
    student = metrics["student"]
    if not _finite(student.get(figure.key)):
        return None
    by_solver: dict[str, list[Point]] = {}
    for row in metrics["teacher_rows"]:
        if _finite(row.get(figure.key)):
            by_solver.setdefault(row["source"], []).append((row["evaluations"], row[figure.key]))
    ours = (student["cost_in_teacher_evaluations"], student[figure.key])
    series = [
        Series(name, sorted(points), TEACHER + i, dots=len(points) == 1)
        for i, (name, points) in enumerate(by_solver.items())
    ]
    levels = []
    held_out = metrics.get("real_held_out") or {}
    if _finite(held_out.get(figure.key)):
        levels.append(("real, held out", held_out[figure.key]))
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
        series=[*series, Series("student", [ours], STUDENT, dots=True, loud=True)],
        levels=levels,
        log_x=True,
        log_y=figure.better == "lower",
        summary=f"The student has {number_of(figure, student)} at a cost of {ours[0]:.1f}; {rival}.",
    )


def number_of(figure: Figure, row: dict[str, Any]) -> str:
    return f"{figure.title} {figure.text(row)}"


def loss_chart(curve: Sequence[dict[str, Any]]) -> Chart | None:
    points = _points(curve, "step", lambda line: line.get("loss"))
    if not points:
        return None
    return Chart(
        title="Training loss",
        x="step",
        y="weighted distance of a batch",
        series=[Series("loss", points, STUDENT)],
        log_y=True,
        summary=_fall("The loss", points),
    )


def heldout_chart(curve: Sequence[dict[str, Any]], times: Sequence[float]) -> Chart | None:
    """Relative error by time point while training, on noise that training never sees."""
    key = "heldout_error_per_time"
    series = []
    for i, time in enumerate(times):
        points = _points(curve, "step", lambda line, i=i: (line.get(key) or [])[i : i + 1])
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


def history_figures(history: dict[str, Any], extractor: str) -> list[Figure]:
    """What to draw of a history: the distance, and what its best is chosen by where that is another figure."""
    known = judging_figures(extractor)
    chosen_by = (history.get("best") or {}).get("metric", "fid")
    return [known[metric] for metric in dict.fromkeys(["fid", chosen_by]) if metric in known]


def history_chart(history: dict[str, Any], figure: Figure, level: tuple[str, float] | None) -> Chart | None:
    """A figure of each evaluated checkpoint by its step, a line for each moving average.

    Only of rows that were evaluated with the same settings as the best.
    """
    settings = best_row(history).get("evaluation") if history["rows"] else None
    rows = [row for row in history["rows"] if row.get("evaluation") == settings]
    decays = sorted({row.get("ema_decay") for row in rows}, key=lambda decay: (decay is None, decay or 0.0))
    series = []
    for i, decay in enumerate(decays):
        points = _points(
            (row for row in rows if row.get("ema_decay") == decay),
            "step",
            lambda row: value_of(row, figure.key),
        )
        if points:
            series.append(
                Series("student" if decay is None else f"EMA {decay:g}", points, i if i == 0 else i + 1)
            )
    if not series:
        return None
    choose = min if figure.better == "lower" else max
    name, best = choose(
        ((s.name, point) for s in series for point in s.points), key=lambda found: found[1][1]
    )
    of = f" ({name})" if len(series) > 1 else ""
    return Chart(
        title=f"{figure.title} against step",
        x="step",
        y=f"{figure.title} ({figure.better} is better)",
        series=series,
        levels=[level] if level else [],
        log_y=figure.better == "lower",
        summary=f"Best so far: {best[1]:.{figure.decimals}f} at step {number(best[0])}{of}.",
    )


def chart_table(chart: Chart, most: int = 25) -> tuple[list[str], list[list[str]]]:
    """The chart's figures as a table by x; long lines as the means of `most` stretches."""
    columns = [(s.name, dict(averaged(s.points, most))) for s in chart.series]
    xs = sorted({x for _, points in columns for x in points})
    header = [chart.x, *(name for name, _ in columns)]
    rows = [[number(x), *(number_3(points[x]) if x in points else "" for _, points in columns)] for x in xs]
    return header, rows


def number_3(value: float) -> str:
    """Three digits that count, such as 0.0123 or 45.6."""
    return f"{value:.3g}" if abs(value) < 1000 else number(value)


def _points(lines: Iterable[dict[str, Any]], x: str, read: Any) -> list[Point]:
    """(x, what `read` finds) of each line that has it, by x. `read` may give a list, of which the first is taken."""
    found = {}
    for line in lines:
        value = read(line)
        if isinstance(value, list):
            value = value[0] if value else None
        if _finite(value) and _finite(line.get(x)):
            found[float(line[x])] = float(value)
    return sorted(found.items())


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _fall(what: str, points: Sequence[Point]) -> str:
    first, last = points[0], points[-1]
    if len(points) == 1:
        return f"{what} is {number_3(first[1])} at step {number(first[0])}, the only one recorded."
    word = "falls" if last[1] < first[1] else "goes"
    return (
        f"{what} {word} from {number_3(first[1])} at step {number(first[0])} "
        f"to {number_3(last[1])} at step {number(last[0])}."
    )
