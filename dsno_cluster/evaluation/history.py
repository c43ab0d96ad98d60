"""history.json, the measurements of `eval --watch`, and the best of them.

Needs no torch, as the report reads it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsno_cluster.config import Config
from dsno_cluster.evaluation.records import Best, History, HistoryRow, read_file
from dsno_cluster.evaluation.table import Figure, known_figures
from dsno_cluster.features import INCEPTION
from dsno_cluster.storage import Storage

# the figure by which a metric of the config is judged, if it has another name
_FIGURES = {"precision_recall": "f_score", "nearest": "copies"}


def history_key(config: Config) -> str:
    return f"evaluation/{config.name}/history.json"


def read_history(storage: Storage, config: Config) -> History:
    """The earlier measurements. Raises UserError for a damaged file."""
    return read_file(History, storage, history_key(config)) or History()


def best_of(rows: Sequence[HistoryRow], metric: str) -> Best | None:
    """The best row by a metric; None if no row has a finite value of it."""
    values = [(row, value_of(row, metric)) for row in rows]
    valued = [(row, value) for row, value in values if value is not None and math.isfinite(value)]
    if not valued:
        return None
    choose = min if judging_figures(INCEPTION)[metric].better == "lower" else max
    row, value = choose(valued, key=lambda pair: pair[1])
    return Best(step=row.step, ema_decay=row.ema_decay, metric=metric, value=value)


def judging_figures(extractor: str) -> dict[str, Figure]:
    """The figure by which each metric is judged, by the config's name of the metric.

    Titles depend on the extractor.
    """
    names = {key: metric for metric, key in _FIGURES.items()}
    known = {
        names.get(figure.key, figure.key): figure
        for figure in known_figures(extractor)
        if figure.key not in _FIGURES  # not what the metric of that name is judged by
    }
    known["trajectory_error"] = Figure("trajectory_error", "mean trajectory error", 4, "lower")
    return known


def text_of(row: HistoryRow, metric: str, figure: Figure) -> str:
    """A row's figure as tables show it, with its interval; empty if the row has none."""
    if metric != "trajectory_error":
        return figure.text(row)
    value = value_of(row, metric)
    return "" if value is None else f"{value:.{figure.decimals}f}"


def best_row(history: History) -> HistoryRow:
    """The row that `best` of a non-empty history names, or its last.

    A student may have several rows, of evaluations with other settings: the best's value tells them apart.
    """
    best = history.best
    if best is None:
        return history.rows[-1]
    same = [row for row in history.rows if (row.step, row.ema_decay) == (best.step, best.ema_decay)]
    chosen = [row for row in same if value_of(row, best.metric) == best.value]
    return (chosen or same or history.rows)[-1]


def value_of(row: HistoryRow, metric: str) -> float | None:
    """A row's figure by the config's name of a metric; for the trajectory error, the mean over times."""
    if metric == "trajectory_error":
        errors = row.trajectory_error
        return sum(errors.values()) / len(errors) if errors else None
    return row.figure(_FIGURES.get(metric, metric))
