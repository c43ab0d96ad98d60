"""What `eval --watch` measured: history.json, its rows and the best of them. Read without torch, for the report too."""

from __future__ import annotations

import json
from typing import Any

from dsno_cluster.config import Config
from dsno_cluster.evaluation.table import INCEPTION, Figure, known_figures
from dsno_cluster.storage import MissingObject, Storage

# the figure that a metric of the config is judged by, where it is called otherwise
_FIGURES = {"precision_recall": "f_score"}


def history_key(config: Config) -> str:
    return f"evaluation/{config.name}/history.json"


def read_history(storage: Storage, config: Config) -> dict[str, Any]:
    """What was measured before: `rows`, oldest first, and the `best` of them or None."""
    try:
        return dict(json.loads(storage.read(history_key(config))))
    except MissingObject:
        return {"rows": [], "best": None}


def best_of(rows: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The best row by a metric: step, average and value; None where no row has it."""
    valued = [(row, value) for row in rows if (value := value_of(row, metric)) is not None]
    if not valued:
        return None
    choose = min if judging_figures(INCEPTION)[metric].better == "lower" else max
    row, value = choose(valued, key=lambda pair: pair[1])
    return {"step": row["step"], "ema_decay": row["ema_decay"], "metric": metric, "value": value}


def judging_figures(extractor: str) -> dict[str, Figure]:
    """By the config's name of each metric the figure that it is judged by, called as with an extractor."""
    names = {key: metric for metric, key in _FIGURES.items()}
    known = {names.get(figure.key, figure.key): figure for figure in known_figures(extractor)}
    known["trajectory_error"] = Figure("trajectory_error", "mean trajectory error", 4, "lower")
    return known


def value_of(row: dict[str, Any], metric: str) -> float | None:
    """A row's figure by the config's name of a metric; where it is one for each time, their mean."""
    value = row.get(_FIGURES.get(metric, metric))
    if isinstance(value, dict):
        return sum(value.values()) / len(value) if value else None
    return value
