"""The figures of metrics.json as a table, the same in the terminal, in samples.png and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsno_cluster.config.protocols import PROTOCOLS
from dsno_cluster.evaluation.records import Figures, Measurement, Metrics, StudentRow
from dsno_cluster.features import INCEPTION

MOST_DECIMALS = 8
# what the field calls the Frechet distance by an extractor
FRECHET_DISTANCES = {INCEPTION: "FID", "inception-v3-clean": "clean-FID", "dinov2": "FD-DINOv2"}


@dataclass(frozen=True)
class Figure:
    """A figure of rows of metrics.json: key, title, decimals, and what is better: as real images have it, for some figures."""

    key: str
    title: str
    decimals: int
    better: Literal["lower", "higher", "as real"]

    def text(self, row: Figures) -> str:
        """The figure of a row with half of its interval, or without one its standard deviation, if the row has either.

        It has as many decimals as show what follows the ±, and the figures of all draws if there are several; it is empty if
        the row has no such figure.
        """
        value, spread, decimals = row.figure(self.key), row.figure(f"{self.key}_ci95"), self.decimals
        if value is None:
            return ""
        spread = row.figure(f"{self.key}_std") if spread is None else spread
        while spread and decimals < MOST_DECIMALS and float(f"{spread:.{decimals}f}") == 0:
            decimals += 1
        draws = row.fid_draws if self.key == "fid" else ()
        return (
            f"{value:.{decimals}f}"
            + (f" ± {spread:.{decimals}f}" if spread else "")
            + (f" ({', '.join(f'{draw:.{decimals}f}' for draw in draws)})" if draws else "")
        )


def known_figures(extractor: str) -> list[Figure]:
    """Every figure that a table may show, in order; the titles depend on the extractor."""
    inception = extractor == INCEPTION
    return [
        Figure("fid", FRECHET_DISTANCES.get(extractor, "Frechet distance"), 2, "lower"),
        Figure("sfid", "sFID", 2, "lower"),
        Figure("kid", "KID" if inception else "kernel distance", 4, "lower"),
        Figure("cmmd", "CMMD" if extractor == "clip" else "Gaussian kernel distance", 3, "lower"),
        Figure("inception_score", "Inception score" if inception else "class score", 2, "higher"),
        Figure("precision", "precision", 3, "higher"),
        Figure("recall", "recall", 3, "higher"),
        Figure("f_score", "F-score", 3, "higher"),
        Figure("nearest", "nearest training image", 3, "as real"),
        Figure("copies", "copies", 3, "lower"),
        Figure("agreement", "right class", 3, "higher"),
    ]


def figures_of(metrics: Metrics) -> list[Figure]:
    """The figures that any row of the metrics has."""
    rows = all_rows(metrics)
    known = known_figures(metrics.feature_extractor.name)
    return [figure for figure in known if any(row.figure(figure.key) is not None for row in rows)]


def conditions(metrics: Measurement) -> str:
    """For the caption of a table: the extractor of its figures, whether the student was trained by it, and the protocol."""
    title = PROTOCOLS[metrics.protocol].title if metrics.protocol in PROTOCOLS else metrics.protocol
    taken = metrics.student.fid_draws if isinstance(metrics, Metrics) else ()
    draws = draws_taken(metrics.protocol, len(taken) or 1)
    seen = isinstance(metrics, Metrics) and metrics.checkpoint.was_trained_by(metrics.feature_extractor)
    words = [
        metrics.feature_extractor.name,
        "by which the student was trained" if seen else None,
        title,
        draws,
    ]
    return ", ".join(word for word in words if word)


def draws_taken(protocol: str | None, draws: int) -> str | None:
    """How a figure was taken from so many draws; None where one is all that is asked for."""
    asked = PROTOCOLS[protocol].keys["draws"] if protocol in PROTOCOLS else 1
    if draws > 1:
        return f"the minimum of {draws} draws"
    return f"one draw, where the protocol takes the minimum of {asked}" if asked > 1 else None


def spread_notes(figures: Sequence[Figure], rows: Sequence[Figures]) -> list[str]:
    """What ± means in a table of these rows, a line for each meaning."""
    of_draws = [f for f in figures if any(row.figure(f"{f.key}_ci95") is not None for row in rows)]
    of_parts = [f.title for f in figures if f not in of_draws and any("±" in f.text(row) for row in rows)]
    notes = []
    if of_draws:
        notes.append("±: half of the 95 % interval, over other draws of the samples.")
    if of_parts:
        notes.append(f"± of {' and '.join(of_parts)}: standard deviation over parts of the samples.")
    return notes


def all_rows(metrics: Metrics) -> list[Figures]:
    """Every row of the table that has figures."""
    held_out = [metrics.real_held_out] if metrics.real_held_out else []
    return [*held_out, *metrics.teacher_rows, *student_rows(metrics)]


def table_rows(metrics: Metrics) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: the real data's, the teacher's by cost, and finally those of `student_rows`."""
    figures = figures_of(metrics)
    header = ["samples", "NFE", "cost", *(figure.title for figure in figures)]
    rows = []
    held_out = metrics.real_held_out
    if held_out:
        rows.append([f"real, {held_out.num_samples} held out", "", "", *_texts(figures, held_out)])
    for row in metrics.teacher_rows:
        rows.append([row.source, str(row.evaluations), str(row.evaluations), *_texts(figures, row)])
    for student in student_rows(metrics):
        cost = student.cost_in_teacher_evaluations
        rows.append([student.source, "1", "-" if cost is None else f"{cost:.1f}", *_texts(figures, student)])
    return header, rows


def student_rows(metrics: Metrics) -> list[StudentRow]:
    """The student before finishing, if there is one, and the evaluated student."""
    return [*([metrics.before] if metrics.before else []), metrics.student]


def _texts(figures: Sequence[Figure], row: Figures) -> list[str]:
    return [figure.text(row) for figure in figures]


def error_lines(metrics: Metrics) -> list[str]:
    """Relative error of the student against the teacher's own trajectory, a line per time point; before -> after finishing."""
    before = (metrics.before.trajectory_error if metrics.before else None) or {}
    errors = metrics.student.trajectory_error or {}
    return [
        f"t = {float(t):.4g}: " + (f"{before[t]:.3f} -> " if t in before else "") + f"{error:.3f}"
        for t, error in errors.items()
    ]
