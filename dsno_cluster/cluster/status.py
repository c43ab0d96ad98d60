"""The commands `status`, `logs` and `cancel`, on run folders and through launchers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dsno_cluster import console
from dsno_cluster.cluster.launchers import State, launcher_of, states_of
from dsno_cluster.cluster.launchers.following import POLL_SECONDS, followed
from dsno_cluster.cluster.reasons import how_it_ended, lost_nodes
from dsno_cluster.cluster.records import AttemptProgress, Idle, Outcome, Result
from dsno_cluster.cluster.runs import Attempt, Run, matching_runs, newest_attempts, the_only_run
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.provenance import Code

CANCEL_SECONDS = 120.0
SHOWN = 20  # number of runs by default


class Row(BaseModel):
    """What `status` reports about a run; its JSON is a row of `status --json`."""

    model_config = ConfigDict(frozen=True)

    run: str
    stage: str | None
    job: str | None
    launcher: str | None
    state: str
    why: str
    nodes: str
    attempts: int
    done: int | None
    total: int | None
    unit: str | None
    rate: float | None
    seconds_left: float | None
    last_error: str
    folder: str
    code: Code | None


def overview(runs: Sequence[Run]) -> list[Row]:
    """A row for each run."""
    attempts = {
        run: newest_attempts(run) for run in runs
    }  # before the states: one that begins meanwhile is not over
    return [_row(run, state, attempts[run]) for run, state in states_of(runs).items()]


def _row(run: Run, state: State, attempts: Sequence[Attempt]) -> Row:
    record = run.record()
    last = attempts[-1] if attempts else None
    progress = last.read(AttemptProgress) if last else None
    idle = last.read(Idle) if last and state.word == "running" else None
    why_now = state.why
    if state.word == "running":
        why_now = f"no progress for {console.duration(idle.seconds)}" if idle else why_now
        why_now = "; ".join(filter(None, [why_now, progress.remark if progress else ""]))
    left = None
    if progress and not idle and state.word == "running" and progress.rate > 0:
        left = (progress.total - progress.done) / progress.rate
    return Row(
        run=run.id,
        stage=record.stage or None,
        job=run.job,
        launcher=record.launcher,
        state=state.word,
        why=why_now,
        nodes=state.nodes,
        attempts=len(attempts),
        done=progress.done if progress else None,
        total=progress.total if progress else None,
        unit=progress.unit if progress else None,
        rate=progress.rate if progress else None,
        seconds_left=left,
        last_error=_last_error(state, attempts),
        folder=str(run.folder),
        code=record.code,
    )


def _last_error(state: State, attempts: Sequence[Attempt]) -> str:
    """What went wrong last: why the run failed, or in a run that has not ended, why its last attempt did."""
    if not state.live:
        return state.why if state.word == "failed" else ""
    if not attempts:
        return ""
    if attempts[0].run != attempts[0].run.whole:
        return _last_error_of_array(attempts)
    if state.word == "running" and (lost := lost_nodes(attempts[-1])):
        return f"continues without {len(lost)} node(s): {lost[-1]}"
    # a job that waits has no attempt, even if the batch script of its last one left no outcome
    last_is_over = state.word in ("waiting", "starting") or attempts[-1].read(Outcome) is not None
    over = [a for a in (attempts if last_is_over else attempts[:-1]) if a.read(Result) is None]
    return how_it_ended(over[-1]) if over else ""


def _last_error_of_array(attempts: Sequence[Attempt]) -> str:
    """Why a task's attempt ended last, of those that ended before the work was done."""
    ends = [(a, outcome) for a in attempts if (outcome := a.read(Outcome)) is not None and outcome.reason]
    if not ends:
        return ""
    attempt, outcome = max(ends, key=lambda end: end[1].time)
    return f"task {attempt.run.record().place}: {outcome.reason}"


def history(run: Run) -> list[str]:
    """A line for each attempt that ended before the work was done, or that lost nodes."""
    if run.tasks:
        return [f"task {place}, {line}" for place, task in enumerate(run.tasks) for line in history(task)]
    lines = []
    for attempt in run.attempts():
        if (outcome := attempt.read(Outcome)) is not None and outcome.reason:
            lines.append(f"attempt {attempt.number}: {outcome.reason}")
        elif lost := lost_nodes(attempt):
            lines.append(f"attempt {attempt.number}: without {len(lost)} node(s): {'; '.join(lost)}")
    return lines


def table_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of `status`."""
    header = ["run", "job", "state", "attempts", "progress", "rate", "left", "last error"]
    return header, [_cells(row) for row in rows]


def _cells(row: Row) -> list[str]:
    moving = row.rate is not None and row.state == "running"
    return [
        row.run,
        row.job or "-",
        row.state + (f": {row.why}" if row.why and row.state != "failed" else ""),
        str(row.attempts),
        f"{row.done}/{row.total} {row.unit}" if row.done is not None else "-",
        f"{row.rate:.3g}/s" if moving else "-",
        console.duration(row.seconds_left) if row.seconds_left is not None else "-",
        row.last_error or "-",
    ]


def log_lines(run: Run, rank: int, attempt: int | None, follow: bool) -> Iterator[str]:
    """Lines of a task's log in the newest attempt, or in `attempt`; `follow`: until the run ends.

    Raises UserError if there is none.
    """
    if run.tasks:
        if rank >= len(run.tasks):
            raise UserError(f"--rank {rank}: {run.id} is an array of {len(run.tasks)} tasks, counted from 0")
        yield from log_lines(run.tasks[rank], 0, attempt, follow)
        return
    current, place, shown, look = attempt, 0, None, followed(run, lambda: states_of([run])[run])
    launcher = launcher_of(run)
    while True:
        over = not look().live if follow else True
        numbers = [a.number for a in run.attempts()]
        if current is None:
            current = numbers[-1] if numbers else None
        file = launcher.logs(run, rank, current) if launcher is not None else None
        if file is None and not follow:
            raise UserError(_no_log(run, rank, attempt, numbers))
        if file != shown:  # the batch script's log until the task has its own
            place, shown = 0, file
        text = _text(file)
        complete = text if over else text[: text.rfind("\n") + 1]
        yield from complete[place:].splitlines()
        place = max(place, len(complete))
        newer = [n for n in numbers if current is not None and n > current]
        if newer and attempt is None:
            yield f"-- attempt {newer[0]} --"
            current, place = newer[0], 0
            continue
        if over:
            return
        time.sleep(POLL_SECONDS)


def _no_log(run: Run, rank: int, attempt: int | None, numbers: list[int]) -> str:
    if attempt is not None and attempt not in numbers:
        return f"--attempt {attempt}: {run.id} has had {len(numbers)} attempt(s), counted from 0"
    ranks = sorted(int(f.stem.removeprefix("task-")) for f in run.folder.glob("attempts/*/task-*.log"))
    if ranks:
        return f"--rank {rank}: {run.id} has logs of ranks {', '.join(map(str, dict.fromkeys(ranks)))}"
    if not states_of([run])[run].live:
        return f"{run.id}: has no log; it never began"
    return f"{run.id}: has no log yet; it has not begun"


def _text(file: Path | None) -> str:
    try:
        return file.read_text(errors="replace") if file is not None else ""
    except FileNotFoundError:
        return ""


def run_to_cancel(word: str) -> Run:
    """The run of a word, as `find_run` takes it; if several match, the one that has not ended.

    Raises UserError if there is none, or more than one.
    """
    runs = matching_runs(word)
    alive = [run for run, state in states_of(runs).items() if state.live] if len(runs) > 1 else []
    return the_only_run(word, alive or runs)


def cancel(run: Run) -> str:
    """End a run and wait until it has ended; returns its outcome, in words. Finished work is kept.

    Raises WorkError if it does not end within two minutes.
    """
    state = states_of([run])[run]
    launcher = launcher_of(run)
    if not state.live or launcher is None:
        return f"{state.word} already; there is nothing to cancel"
    if state.word == "state unknown":
        raise WorkError(f"{run.id}: cannot be cancelled from here now: {state.why}")
    with contextlib.suppress(OSError):  # a full disk: cancel the job all the same
        run.cancel()
    launcher.cancel(run)
    deadline = time.monotonic() + CANCEL_SECONDS
    while (state := states_of([run])[run]).live:
        if time.monotonic() > deadline:
            raise WorkError(f"{run.id}: is still {state.word}, {CANCEL_SECONDS:.0f} s after it was cancelled")
        time.sleep(1.0)
    return f"{state.word}; what is done is kept, the same command resumes"
