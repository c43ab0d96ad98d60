"""How runs fare, told from their folders and from Slurm: `status`, `logs`, `cancel`, and following one to its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsno_cluster import console
from dsno_cluster.cluster.attempt import lost_nodes, why
from dsno_cluster.cluster.runs import BATCH_LOG, Attempt, Run, matching_runs, the_only_run
from dsno_cluster.cluster.slurm import JobState, cancel_job, cluster_name, job_states, user_name
from dsno_cluster.errors import UserError, WorkError

POLL_SECONDS = 2.0
ASK_SECONDS = 15.0  # so often Slurm is asked by those who follow a run, for days perhaps
STALE_SECONDS = 60.0
SETTLE_SECONDS = 15.0
CANCEL_SECONDS = 120.0
SHOWN = 20  # runs, where no more are asked for

LIVE = ("waiting", "starting", "running", "ending", "suspended", "state unknown")
WORDS = {
    "PENDING": "waiting",
    "REQUEUED": "waiting",
    "REQUEUE_HOLD": "waiting",
    "SPECIAL_EXIT": "waiting",
    "CONFIGURING": "starting",
    "RUNNING": "running",
    "COMPLETING": "ending",
    "SIGNALING": "running",
    "STAGE_OUT": "ending",
    "STOPPED": "suspended",
    "SUSPENDED": "suspended",
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
    "BOOT_FAIL": "failed",
    "NODE_FAIL": "failed",
    "TIMEOUT": "failed",
    "DEADLINE": "failed",
    "OUT_OF_MEMORY": "failed",
    "PREEMPTED": "failed",
}
WAITS = {
    "Priority": "others are before it",
    "Resources": "for free nodes",
    "Dependency": "for the stage before it",
    "DependencyNeverSatisfied": "for a stage that failed: it will never start",
    "BeginTime": "for its turn to start again",
    "ReqNodeNotAvail": "for nodes that are down, drained or reserved",
    "JobHeldUser": "held by its owner",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "its time limit is above the partition's",
    "QOSMaxJobsPerUserLimit": "for another job of yours to end",
    "AssocGrpGRES": "for the account's share of GPUs",
}
ENDS = {
    "NODE_FAIL": "a node was lost",
    "TIMEOUT": "its time limit was reached",
    "OUT_OF_MEMORY": "it needed more memory than mem_gb",
    "PREEMPTED": "another job needed its nodes",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "its deadline was reached",
}


@dataclass(frozen=True)
class State:
    """What a run is doing, in a plain word, and why."""

    word: str
    why: str = ""
    nodes: str = ""


def states_of(runs: Sequence[Run]) -> dict[Run, State]:
    """The state of each run. Where Slurm does not answer, what the folders say, and `state unknown` of the others."""
    jobs: dict[str, list[str]] = {}
    for run in runs:
        if run.record().get("launcher") == "slurm" and not _final(run):
            jobs.setdefault(run.owner, []).append(str(run.record().get("job")))
    known: dict[str, JobState] | None
    try:
        known = {job: state for owner, ids in jobs.items() for job, state in job_states(ids, owner).items()}
    except (UserError, WorkError) as error:
        console.say(f"Slurm does not say how jobs fare now: {error}")
        known = None
    return {run: _state_of(run, known) for run in runs}


def _state_of(run: Run, jobs: dict[str, JobState] | None) -> State:
    if final := _final(run):
        return final
    record = run.record()
    if "job" not in record:
        return State("failed", "it was never submitted")
    if record["launcher"] == "local":
        return _local_state(run)
    if jobs is None:
        return State("state unknown", "Slurm does not answer")
    if record.get("cluster") not in (None, cluster_name()):
        return State("state unknown", f"it is on the cluster {record['cluster']}, this is {cluster_name()}")
    job = jobs.get(str(record["job"]))
    attempts = run.attempts()
    if job is None and run.owner != user_name(os.getuid()):
        return State("state unknown", f"Slurm tells {user_name(os.getuid())} nothing of {run.owner}'s jobs")
    if job is None:
        last = why(attempts[-1], None) if attempts else "it never began"
        return State("cancelled" if run.cancelled else "failed", f"Slurm no longer knows the job; {last}")
    word = WORDS.get(job.state, "state unknown")
    if word == "state unknown":
        return State(word, job.state)
    if word == "waiting":
        reason, _, more = job.reason.partition(",")
        known = WAITS.get(reason)
        said = "" if job.reason == "None" else job.reason  # in Slurm's own words
        return State(word, said if known is None else known + more.replace("_", " "))
    if word in LIVE:
        return State(word, "", job.nodes)
    if word == "failed" and job.seconds_over() < SETTLE_SECONDS:
        return State("ending")  # so Slurm says for a moment of a job that it is about to requeue
    if word == "cancelled" and record.get("after") and not attempts and not run.cancelled:
        return State(word, "the stage that it waited for did not end well")
    return State(word, ENDS.get(job.state, "" if word in ("done", "cancelled") else job.state))


def _final(run: Run) -> State | None:
    """The state that the last attempt's batch script left, where it is a final one."""
    attempts = run.attempts()
    outcome = attempts[-1].read("outcome") if attempts else None
    if outcome is None or outcome["state"] == "again":
        return None
    return State(outcome["state"], outcome["reason"])


def _local_state(run: Run) -> State:
    import psutil

    attempts = run.attempts()
    last = attempts[-1] if attempts else None
    if last is not None and last.read("result") is not None:
        return State("done")
    if run.record()["host"] != socket.gethostname():
        return State("state unknown", f"it is on {run.record()['host']}")
    try:
        alive = psutil.Process(int(run.record()["job"]))
        if alive.is_running() and alive.create_time() <= run.record()["submitted"] + STALE_SECONDS:
            return State("running", "", "this machine")
    except psutil.NoSuchProcess:
        pass
    if run.cancelled:
        return State("cancelled")
    failure = last.failure() if last is not None else None
    return State("failed", failure["reason"] if failure else "its processes ended without a word")


def overview(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row of plain values a run, for the table of `status` and its --json."""
    rows = []
    for run, state in states_of(runs).items():
        record, attempts = run.record(), run.attempts()
        last = attempts[-1] if attempts else None
        progress = last.read("progress") if last else None
        over = [
            a
            for a in attempts
            if a.read("result") is None
            and (a is not last or state.word not in LIVE or a.read("outcome") is not None)
        ]
        error = state.why if state.word == "failed" else (_reason(over[-1]) if over else "")
        if last is not None and state.word == "running" and (lost := lost_nodes(last)):
            error = f"goes on without {len(lost)} node(s): {lost[-1]}"
        left = None
        if progress and state.word == "running" and progress["rate"] > 0:
            left = (progress["total"] - progress["done"]) / progress["rate"]
        rows.append(
            {
                "run": run.id,
                "stage": record.get("stage"),
                "job": record.get("job"),
                "launcher": record.get("launcher"),
                "state": state.word,
                "why": state.why,
                "nodes": state.nodes,
                "attempts": len(attempts),
                "done": progress["done"] if progress else None,
                "total": progress["total"] if progress else None,
                "unit": progress["unit"] if progress else None,
                "rate": progress["rate"] if progress else None,
                "seconds_left": left,
                "last_error": error,
                "folder": str(run.folder),
                "code": record.get("code"),
            }
        )
    return rows


def _reason(attempt: Attempt) -> str:
    outcome = attempt.read("outcome")
    return why(attempt, None) if outcome is None else str(outcome["reason"])


def table_rows(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of `status`."""
    header = ["run", "job", "state", "attempts", "progress", "rate", "left", "last error"]
    cells = []
    for row in rows:
        done = row["done"] is not None
        progress = f"{row['done']}/{row['total']} {row['unit']}" if done else "-"
        state = row["state"] + (f": {row['why']}" if row["why"] and row["state"] != "failed" else "")
        moving = done and row["state"] == "running"
        cells.append(
            [
                row["run"],
                str(row["job"] or "-"),
                state,
                str(row["attempts"]),
                progress,
                f"{row['rate']:.3g}/s" if moving else "-",
                console.duration(row["seconds_left"]) if row["seconds_left"] is not None else "-",
                row["last_error"] or "-",
            ]
        )
    return header, cells


def _followed(run: Run) -> Callable[[], State]:
    """The state of a run for those who ask again and again: Slurm is asked when an attempt begins, and now and then."""
    asked, begun, state = float("-inf"), -1, State("state unknown")

    def look() -> State:
        nonlocal asked, begun, state
        attempts = len(run.attempts())
        if time.monotonic() - asked > ASK_SECONDS or attempts != begun or _final(run):
            state = states_of([run])[run]  # which does not ask Slurm of a run that has ended
            asked, begun = time.monotonic(), attempts
        return state

    return look


def wait_for(run: Run) -> str:
    """Follow a run to its end with live progress; returns its result. Ctrl-C leaves it running.

    Raises WorkError or UserError with its reason where it fails or is cancelled.
    """
    said, shown, look = "", None, _followed(run)
    with contextlib.ExitStack() as bar:
        advance: Any = None
        while True:
            state = look()
            attempts = run.attempts()
            text = f"{run.id}: {state.word}" + (f", {state.why}" if state.why and state.word in LIVE else "")
            if text != said and state.word in LIVE:
                console.say(text + (f" on {state.nodes}" if state.nodes else ""))
                said = text
            progress = attempts[-1].read("progress") if attempts else None
            if progress:
                stretch = (attempts[-1].number, progress["title"])
                if shown is None or shown[0] != stretch:
                    bar.close()
                    advance = bar.enter_context(
                        console.progress(
                            progress["title"], progress["total"], progress["unit"], done=progress["start"]
                        )
                    )
                    shown = (stretch, progress["start"])
                advance(progress["done"] - shown[1])
                shown = (stretch, progress["done"])
            if state.word not in LIVE:
                break
            time.sleep(POLL_SECONDS)
    result = attempts[-1].read("result") if attempts else None
    if result is not None:
        return str(result["result"])
    failure = attempts[-1].failure() if attempts else None
    kind = UserError if failure and failure["kind"] == "user" else WorkError
    raise kind(f"{run.id} {state.word}: {state.why or 'see `dsno-cluster logs ' + run.id + '`'}")


def log_lines(run: Run, rank: int, attempt: int | None, follow: bool) -> Iterator[str]:
    """Lines of a task's log, of the newest attempt unless one is named; `follow`: until the run ends, over new attempts.

    Where the task has no log yet, what the batch script printed. Raises UserError where there is nothing of the kind.
    """
    current, place, shown, look = attempt, 0, None, _followed(run)
    while True:
        over = look().word not in LIVE if follow else True
        numbers = [a.number for a in run.attempts()]
        if current is None:
            current = numbers[-1] if numbers else None
        file = _log_file(run, rank, current)
        if file is None and not follow:
            raise UserError(_no_log(run, rank, attempt, numbers))
        if file != shown:  # the batch script's log until the task has one of its own
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


def _log_file(run: Run, rank: int, attempt: int | None) -> Path | None:
    if run.record().get("launcher") == "local":
        found = sorted(run.folder.glob(f"submitit/*_{rank}_log.err"))
        return found[-1] if found else None
    file = run.attempt(attempt).log(rank) if attempt is not None else None
    if file is not None and file.is_file():
        return file
    batch, begun = run.folder / BATCH_LOG, file is None or file.parent.is_dir()
    return batch if rank == 0 and begun and batch.is_file() else None


def _no_log(run: Run, rank: int, attempt: int | None, numbers: list[int]) -> str:
    if attempt is not None and attempt not in numbers:
        return f"--attempt {attempt}: {run.id} has had {len(numbers)} attempt(s), counted from 0"
    ranks = sorted(int(f.stem.removeprefix("task-")) for f in run.folder.glob("attempts/*/task-*.log"))
    if ranks:
        return f"--rank {rank}: {run.id} has logs of ranks {', '.join(map(str, dict.fromkeys(ranks)))}"
    if states_of([run])[run].word not in LIVE:
        return f"{run.id}: has no log; it never began"
    return f"{run.id}: has no log yet; it has not begun"


def _text(file: Path | None) -> str:
    try:
        return file.read_text(errors="replace") if file is not None else ""
    except FileNotFoundError:
        return ""


def run_to_cancel(word: str) -> Run:
    """The run of a word, as `find_run` takes it; of several with that beginning the one that has not ended.

    Raises UserError where there is none, or more than one.
    """
    runs = matching_runs(word)
    alive = [run for run, state in states_of(runs).items() if state.word in LIVE] if len(runs) > 1 else []
    return the_only_run(word, alive or runs)


def cancel(run: Run) -> str:
    """End a run and wait until it has; returns what became of it, in words. What is done is kept.

    Raises WorkError where it does not end within two minutes.
    """
    state = states_of([run])[run]
    if state.word not in LIVE:
        return f"{state.word} already; nothing is to be cancelled"
    if state.word == "state unknown":
        raise WorkError(f"{run.id}: cannot be cancelled from here now: {state.why}")
    with contextlib.suppress(OSError):  # a full disk: Slurm is told all the same
        run.cancel()
    record = run.record()
    if record["launcher"] == "slurm":
        cancel_job(str(record["job"]))
    else:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(int(record["job"])).children():
                rank.send_signal(signal.SIGINT)
    deadline = time.monotonic() + CANCEL_SECONDS
    while (state := states_of([run])[run]).word in LIVE:
        if time.monotonic() > deadline:
            raise WorkError(f"{run.id}: is {state.word} still, {CANCEL_SECONDS:.0f} s after it was cancelled")
        time.sleep(1.0)
    return f"{state.word}; what is done is kept, the same command continues"
