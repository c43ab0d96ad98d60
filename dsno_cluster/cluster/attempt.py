"""Beginning and end of an attempt at a job.

The batch script runs `python -m dsno_cluster.cluster.attempt begin|end RUN`.

`begin` makes the attempt's folder, or refuses if too many earlier attempts made no progress. `end RUN STATUS`
decides whether the job is done, is started again (if a node, a network or a library failed) or is given up.
Its exit status becomes that of the job, on which Slurm's `afterok` depends.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dsno_cluster.cluster.reasons import KILLED, oom_kills, why
from dsno_cluster.cluster.records import AttemptRecord, Begin, Outcome, Result, Stopped
from dsno_cluster.cluster.runs import BATCH_LOG, Attempt, Run, fruitless
from dsno_cluster.cluster.slurm_commands import may_heal, requeue_job, who_ends
from dsno_cluster.cluster.task import attempt_number
from dsno_cluster.errors import UserError, WorkError

T = TypeVar("T")

OUTAGE_SECONDS = 900.0  # a controller may be restarting when a job asks to be requeued
REFUSED_SECONDS = 60.0  # or it may refuse for a moment, for example while a job is completing
PAUSE_SECONDS = 10.0


def begin(run: Run) -> int:
    """Open this attempt; returns the exit status, 0 if the job may run."""
    attempt = run.attempt(attempt_number())
    former = [a for a in run.attempts() if a.number < attempt.number]
    attempt.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / BATCH_LOG
    begun = Begin(
        job=os.environ.get("SLURM_JOB_ID"),
        nodes=os.environ.get("SLURM_JOB_NODELIST"),
        batch_log_bytes=log.stat().st_size if log.is_file() else 0,
        oom_kills=oom_kills(),
    )
    _note(attempt, begun)
    if run.cancelled:
        _note(attempt, Outcome(state="cancelled", reason="cancelled before it began"))
        return 1
    if (streak := fruitless(former)) > run.profile().retries:
        return _give_up(attempt, streak, why(former[-1], None))
    return 0


def end(run: Run, status: int) -> int:
    """Close this attempt, whose srun ended with `status`; returns the job's exit status."""
    attempt, job = run.attempt(attempt_number()), os.environ["SLURM_JOB_ID"]
    if attempt.read(Result) is not None:  # rank 0 finished; other tasks may have been lost with their nodes
        _note(attempt, Outcome(state="done"))
        return 0
    ended = "cancelled" if run.cancelled else _patiently(lambda: who_ends(job, attempt.number))
    if ended == "cancelled":
        _note(attempt, Outcome(state="cancelled"))
        return KILLED + signal.SIGTERM
    reason = why(attempt, status)
    if ended == "requeued":  # by Slurm for another job, or by an administrator
        _note(attempt, Outcome(state="again", reason=reason))
        return 1
    if ended == "time limit" and attempt.read(Stopped) is None:
        reason = "its time limit was reached before it had saved"
    failure = attempt.failure()
    if failure and failure.kind == "user":
        _note(attempt, Outcome(state="failed", reason=reason))
        return 2
    if not run.profile().requeue:
        reason += "; its profile says no-requeue: the same command resumes"
        _note(attempt, Outcome(state="failed", reason=reason))
        return 1
    if (streak := fruitless(run.attempts())) > run.profile().retries:
        return _give_up(attempt, streak, reason)
    _note(attempt, Outcome(state="again", reason=reason))
    print(f"dsno-cluster: {reason}; the job is started again", flush=True)

    def requeue() -> None:
        if who_ends(job, attempt.number) != "requeued":  # nobody requeued it meanwhile
            requeue_job(job)

    try:
        _patiently(requeue)
    except WorkError as error:
        reason += f"; and Slurm did not requeue the job: {error}"
        _note(attempt, Outcome(state="failed", reason=reason))
        return 1
    # If the script ends before Slurm's signal arrives, the job may count as failed (seen with 22.05): wait
    # for it.
    time.sleep(OUTAGE_SECONDS)
    return 1


def _patiently(ask: Callable[[], T]) -> T:
    """The answer of a controller that may be restarting.

    Raises WorkError if it stays silent, or sooner if it refuses.
    """
    began = time.monotonic()
    while True:
        try:
            return ask()
        except WorkError as error:
            patience = OUTAGE_SECONDS if may_heal(str(error)) else REFUSED_SECONDS
            if time.monotonic() - began > patience:
                raise
            time.sleep(PAUSE_SECONDS)


def _note(attempt: Attempt, record: AttemptRecord) -> None:
    """Write a record; a full disk must not change the outcome of the job."""
    try:
        attempt.write(record)
    except OSError as error:
        print(f"dsno-cluster: {attempt.folder}/{record.file_name}: cannot be written: {error}", flush=True)


def _give_up(attempt: Attempt, streak: int, reason: str) -> int:
    text = f"given up: {streak} attempts in a row made no progress; the last: {reason}"
    _note(attempt, Outcome(state="failed", reason=text))
    print(f"dsno-cluster: {text}", flush=True)
    return 1


def main(words: Sequence[str]) -> int:
    run = Run(Path(words[1]))
    try:
        return begin(run) if words[0] == "begin" else end(run, int(words[2]))
    except (UserError, WorkError, OSError) as error:  # a full disk raises OSError, which names the file
        print(f"dsno-cluster: {error}", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
