"""eval --watch: each checkpoint of a training, and each of its moving averages, evaluated once as they appear.

What was measured stands in `<storage.root>/evaluation/<name>/history.json`, a row for each; metrics and pictures of each lie
below it in `step-000001000-ema-0.999/`. `<storage.root>/students/<name>/best-<metric>` names the best step.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.evaluation.evaluate import evaluate
from dsno_cluster.evaluation.history import best_of, history_key, read_history
from dsno_cluster.model_folder import META, read_meta, step_name
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import Storage, open_storage

POLL_SECONDS = 20.0
SAY_SECONDS = 600.0


def watch(config: Config, actors: int | None = None, ray_address: str | None = None) -> dict[str, Any]:
    """Evaluate every checkpoint of the config's student until that of its last training step; returns the history.

    Ends with the training: call it again to go on, what is in the history is not measured again. Errors as `evaluate`.
    """
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    where = f"{storage.url}/{config.student_prefix}"
    console.say(
        f"evaluating each checkpoint below {where} up to step {config.training.steps}; the best by "
        f"{config.evaluation.judged_by} is kept track of"
    )
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}
    said = time.monotonic() - SAY_SECONDS
    while True:
        there = checkpoints(storage, config, known)
        # the best anew: it may be asked for by another metric now, or students may be gone
        history = _noted(storage, config, there)
        done = {(row["sha256"], row["evaluation"]) for row in history["rows"]}
        todo = [c for c in there if (c["sha256"], _settings_hash(config)) not in done]
        for checkpoint in todo:
            history = _noted(storage, config, there, _evaluated(config, checkpoint, actors, ray_address))
        last = max((checkpoint["step"] for checkpoint in there), default=-1)
        if last >= config.training.steps:
            break
        if not todo and time.monotonic() - said > SAY_SECONDS:
            console.say(f"waiting for a checkpoint after step {max(last, 0)} below {where}")
            said = time.monotonic()
        if not todo:
            time.sleep(POLL_SECONDS)
    best = history["best"]
    if best is not None:
        average = "" if best["ema_decay"] is None else f", average of decay {best['ema_decay']:g}"
        console.say(f"best by {best['metric']}: {best['value']:.4g} at step {best['step']}{average}")
    return history


def checkpoints(
    storage: Storage, config: Config, known: dict[tuple[str, str], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Step, `ema_decay`, weights' sha256 and address of each student of the config's run, oldest first.

    `known` has those of before by step and etag, so that only new ones are read; it is added to.
    """
    prefix = config.student_prefix
    names = sorted(
        (match[1], stat.etag)
        for stat in storage.list(prefix)
        if (match := re.fullmatch(rf"{re.escape(prefix)}(step-\d+)/{META}", stat.key))
    )
    for name, etag in names:
        if (name, etag) not in known:
            known[name, etag] = _averages(config, f"{config.storage.root.rstrip('/')}/{prefix}{name}")
    return [checkpoint for at in names for checkpoint in known[at]]


def _averages(config: Config, address: str) -> list[dict[str, Any]]:
    """The student at an address, a line for each of its moving averages."""
    meta = read_meta(address, config.storage.endpoint_url)
    averages = {meta.ema_decay: meta.sha256}
    averages |= {float(decay): sha256 for decay, sha256 in meta.averages.items()}
    return [
        {"step": meta.step, "ema_decay": decay, "sha256": sha256, "address": address}
        for decay, sha256 in averages.items()
    ]


def _evaluated(
    config: Config, checkpoint: dict[str, Any], actors: int | None, ray_address: str | None
) -> dict[str, Any]:
    """The history's row of a checkpoint."""
    settings = config.evaluation.model_copy(update={"ema_decay": checkpoint["ema_decay"]})
    average = "" if checkpoint["ema_decay"] is None else f"-ema-{checkpoint['ema_decay']:g}"
    folder = f"evaluation/{config.name}/{step_name(checkpoint['step'])}{average}/"
    metrics = evaluate(
        config.model_copy(update={"evaluation": settings}), checkpoint["address"], actors, ray_address, folder
    )
    known = {key: checkpoint[key] for key in ("step", "ema_decay", "sha256")}
    return {**known, "evaluation": _settings_hash(config), "folder": folder, **metrics["student"]}


def _noted(
    storage: Storage, config: Config, there: list[dict[str, Any]], row: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The history, with a `row` more; the best of the checkpoints that are `there` is named beside the students."""
    before = read_history(storage, config)
    rows = sorted([*before["rows"], *([row] if row else [])], key=lambda r: (r["step"], str(r["ema_decay"])))
    settings, metric = _settings_hash(config), config.evaluation.judged_by
    known = {checkpoint["sha256"] for checkpoint in there}
    best = best_of([r for r in rows if r["evaluation"] == settings and r["sha256"] in known], metric)
    history = {"rows": rows, "best": best}
    if history == before:
        return history
    storage.write(history_key(config), (json.dumps(history, indent=2) + "\n").encode())
    if best is not None:
        storage.write(f"{config.student_prefix}best-{metric}", (step_name(best["step"]) + "\n").encode())
    return history


def _settings_hash(config: Config) -> str:
    """A name for how the evaluation is set, but for what chooses among its results."""
    return canonical_hash(config.evaluation.model_dump(mode="json", exclude={"ema_decay", "best_metric"}))
