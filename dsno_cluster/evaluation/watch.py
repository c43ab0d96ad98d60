"""eval --watch: evaluates each checkpoint of a training, and each of its moving averages, as they appear.

`<storage.root>/evaluation/<name>/history.json` has a row for each; its metrics and pictures are beside that
file in `step-000001000-ema-0.999/`. `<storage.root>/students/<name>/best-<metric>` names the best step.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dsno_cluster import console, liveness
from dsno_cluster.cluster.crew import ANY_CREW, Crew
from dsno_cluster.config import Config
from dsno_cluster.config.loading import EVALUATION_FILES
from dsno_cluster.evaluation.evaluate import evaluate
from dsno_cluster.evaluation.history import (
    best_of,
    best_row,
    history_key,
    judging_figures,
    read_history,
    text_of,
)
from dsno_cluster.evaluation.look_up import find_subject
from dsno_cluster.evaluation.records import History, HistoryRow, rewrite
from dsno_cluster.files import shown_path
from dsno_cluster.model_folder import META, read_meta, step_name
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.teachers import ConfiguredTeacher, DecoderIdentity

POLL_SECONDS = 20.0
SAY_SECONDS = 600.0


@dataclass(frozen=True)
class WatchedStudent:
    """A student of the config's run, or one of its moving averages; `address` is that of its step.

    `ended`: the training ended with it, before its last step.
    """

    step: int
    ended: bool
    ema_decay: float | None
    sha256: str
    address: str


KnownStudents = dict[tuple[str, str], list[WatchedStudent]]  # by step folder and etag of its meta.json


def watch(
    config: Config,
    teacher: ConfiguredTeacher,
    crew: Crew = ANY_CREW,
) -> History:
    """Evaluate every checkpoint of the config's student up to the last one of its training; returns the history.

    If called again it continues, without measuring again what is in the history. `teacher` is the config's.
    Raises as `find_subject` and `evaluate` do, and UserError for a damaged history.
    """
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    where = f"{storage.url}/{config.student_prefix}"
    console.say(
        f"evaluating each checkpoint below {where} up to step {config.training.steps}; the best by "
        f"{config.evaluation.judged_by} is kept track of"
    )
    known: KnownStudents = {}
    decoder = teacher.states.identity(config.evaluation.precision)
    settings = settings_hashes(config, decoder)
    said = time.monotonic() - SAY_SECONDS
    while True:
        there = checkpoints(storage, config, known)
        # choose the best again: the metric may have changed, or students may have been deleted
        history = note_row(storage, config, there, settings)
        done = {row.sha256 for row in history.rows if row.evaluation in settings}
        todo = [student for student in there if student.sha256 not in done]
        for student in todo:
            row = _evaluated(config, teacher, student, settings[0], crew)
            history = note_row(storage, config, there, settings, row)
        last = max((student.step for student in there), default=-1)
        if last >= config.training.steps or any(student.ended for student in there):
            break
        if not todo and time.monotonic() - said > SAY_SECONDS:
            console.say(f"waiting for a checkpoint after step {max(last, 0)} below {where}")
            said = time.monotonic()
        if not todo:
            liveness.moved()
            time.sleep(POLL_SECONDS)
    best = history.best
    if best is not None:
        average = "" if best.ema_decay is None else f", average of decay {best.ema_decay:g}"
        figure = judging_figures(config.evaluation.feature_extractor)[best.metric]
        value = text_of(best_row(history), best.metric, figure)
        console.say(f"best by {best.metric}: {value} at step {best.step}{average}")
    return history


def checkpoints(storage: Storage, config: Config, known: KnownStudents) -> list[WatchedStudent]:
    """The students of the config's run, oldest first.

    `known` has the students found before, so that only new ones are read; they are added to it.
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
    return [student for at in names for student in known[at]]


def _averages(config: Config, address: str) -> list[WatchedStudent]:
    """The student at an address, and each of its further moving averages."""
    meta = read_meta(address, config.storage.endpoint_url)
    averages: dict[float | None, str] = {meta.ema_decay: meta.sha256}
    averages |= {float(decay): sha256 for decay, sha256 in meta.averages.items()}
    step, ended = meta.step or 0, meta.ended is not None
    return [WatchedStudent(step, ended, decay, sha256, address) for decay, sha256 in averages.items()]


def _evaluated(
    config: Config,
    teacher: ConfiguredTeacher,
    student: WatchedStudent,
    settings_hash: str,
    crew: Crew,
) -> HistoryRow:
    """Evaluate a student; returns its row of the history."""
    settings = config.evaluation.model_copy(update={"ema_decay": student.ema_decay})
    average = "" if student.ema_decay is None else f"-ema-{student.ema_decay:g}"
    folder = f"evaluation/{config.name}/{step_name(student.step)}{average}/"
    chosen = config.model_copy(update={"evaluation": settings})
    metrics = evaluate(find_subject(chosen, student.address, teacher), crew, folder)
    known = {
        "step": student.step,
        "ema_decay": student.ema_decay,
        "sha256": student.sha256,
        "evaluation": settings_hash,
        "folder": folder,
    }
    return HistoryRow.model_validate({**known, **metrics.student.values()})


def note_row(
    storage: Storage,
    config: Config,
    there: Sequence[WatchedStudent],
    settings: tuple[str, str],
    row: HistoryRow | None = None,
) -> History:
    """Add a `row` to the history and name the best of the existing students `there`; returns the history.

    `settings` are the hashes by which rows of this evaluation are known. Rows that another evaluation adds meanwhile are kept.
    """
    metric = config.evaluation.judged_by
    known = {student.sha256 for student in there}

    def with_row() -> History | None:
        before = read_history(storage, config)
        measured = {(r.sha256, r.evaluation) for r in before.rows}
        new = [row] if row and (row.sha256, row.evaluation) not in measured else []
        rows = sorted([*before.rows, *new], key=lambda r: (r.step, str(r.ema_decay)))
        best = best_of([r for r in rows if r.evaluation in settings and r.sha256 in known], metric)
        history = History(rows=tuple(rows), best=best)
        return None if history == before else history

    history = rewrite(storage, history_key(config), with_row)
    if history is None:
        return read_history(storage, config)
    best, written = history.best, None
    while best is not None and best != written:  # another evaluation may have found a better one meanwhile
        best_key = f"{config.student_prefix}best-{metric}"
        storage.write(best_key, (step_name(best.step) + "\n").encode())
        best, written = read_history(storage, config).best, best
    return history


def settings_hashes(config: Config, decoder: DecoderIdentity | None = None) -> tuple[str, str]:
    """Hashes of the evaluation's settings, and of the `decoder` if there is one, except those that choose among its results.

    The first names new rows and does not depend on where a checkout lies: paths below the working directory
    are relative to it. With the second, of absolute paths, jobs of earlier versions named theirs.
    """
    absolute = config.evaluation.model_dump(mode="json", exclude={"ema_decay", "best_metric"})
    paths = {key: shown_path(absolute[key]) for key in EVALUATION_FILES if absolute[key] is not None}
    if decoder is not None:
        absolute["decoder"] = decoder.model_dump(mode="json")
    return canonical_hash(absolute | paths), canonical_hash(absolute)
