"""Beginning and end of an attempt at a job.

The batch script runs `python -m dsno_cluster.cluster.attempt begin|end RUN`.

`begin` makes the attempt's folder, or refuses if too many earlier attempts made no progress. `end RUN STATUS`
decides whether the job is done, is started again (if a node, a network or a library failed) or is given up.
Its exit status becomes that of the job, on which Slurm's `afterok` and `afternotok` depend.

An attempt is a start of the run's only job, which is requeued, or a job of the run's chain, of which the next
begins when all before it have ended without success. RUN may also be a task of an array. If there is nothing left to do,
the jobs of a chain or array that wait are cancelled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dsno_cluster import console
from dsno_cluster.cluster.reasons import KILLED, TAKEN_BY_SLURM, how_it_ended, oom_kills, why
from dsno_cluster.cluster.records import Begin, Outcome, Result, Stopped
from dsno_cluster.cluster.runs import BATCH_LOG, Attempt, Run, fruitless
from dsno_cluster.cluster.slurm_commands import (
    OUTAGE_SECONDS,
    cancel_jobs,
    own_job,
    patiently,
    requeue_job,
    who_ends,
    why_told,
)
from dsno_cluster.cluster.task import attempt_number
from dsno_cluster.errors import UserError, WorkError

FINISHED = 100  # the exit status of `begin` if the run is finished


def begin(run: Run) -> int:
    """Open this attempt; returns the exit status, 0 if the job may run.

    A job of a chain or array whose run is over opens none.
    """
    attempt = run.attempt(attempt_number())
    former = [a for a in run.attempts() if a.number < attempt.number]
    over = _over(former[-1]) if run.profile().chain > 1 and former else None
    if over == "done" or _array_is_done(run):
        console.say("nothing to do: the run is finished")
        return FINISHED
    if over is not None:
        console.say(f"nothing to do: the run is over, {over}")
        return 1
    log = run.folder / BATCH_LOG
    begun = Begin(
        job=os.environ.get("SLURM_JOB_ID"),
        nodes=os.environ.get("SLURM_JOB_NODELIST"),
        batch_log_bytes=log.stat().st_size if log.is_file() else 0,
        oom_kills=oom_kills(),
    )
    try:
        patiently(lambda: _open(attempt, begun))
    except WorkError as error:
        # attempts that have no folder could not begin either
        missing = attempt.number - (former[-1].number + 1 if former else 0)
        if missing + fruitless(former) > run.profile().retries:
            raise
        return _start_again(run, attempt, str(error))
    if run.cancelled:
        attempt.note(Outcome(state="cancelled", reason="cancelled before it began"))
        return 1
    if attempt.number and not former and not _may_begin(run):
        attempt.note(Outcome(state="cancelled", reason="the stage that it waited for did not succeed"))
        return 1
    if former:
        _note_preemption(former[-1])
    if (streak := fruitless(former)) > run.profile().retries:
        return _give_up(attempt, streak, why(former[-1], None))
    return 0


def _over(attempt: Attempt) -> str | None:
    """The final state that an attempt of a chain has left; None if the next one is to continue."""
    if attempt.read(Result) is not None:
        return "done"
    outcome = attempt.read(Outcome)
    if outcome is None:  # its batch script was killed; by scancel, as a task may have noted
        stopped = attempt.read(Stopped)
        return "cancelled" if stopped is not None and stopped.why == "cancelled" else None
    return None if outcome.state == "again" else outcome.state


def _array_is_done(run: Run) -> bool:
    """Whether a task of the array to which this one belongs has found all the work done."""
    return any(a.read(Result) is not None for task in run.whole.tasks for a in task.attempts())


def _may_begin(run: Run) -> bool:
    """Whether the run that this one waits for is done.

    Slurm cancels the first job of a chain if it is not, and then starts the second.
    """
    before = run.record().after
    return before is None or any(a.read(Result) is not None for a in Run(Path(before)).attempts())


def _note_preemption(earlier: Attempt) -> None:
    """Note that Slurm took the nodes of an attempt which had no time to note it itself."""
    if earlier.read(Stopped) is None and how_it_ended(earlier) in TAKEN_BY_SLURM:
        earlier.note(Stopped(why="preempted"))


def _open(attempt: Attempt, begun: Begin) -> None:
    """Open the attempt's folder. Raises WorkError if that fails, as on a full disk."""
    try:
        attempt.open(begun)
    except OSError as error:
        raise WorkError(f"{attempt.folder}: cannot be written: {error.strerror}") from error


def end(run: Run, status: int) -> int:
    """Close this attempt, whose srun ended with `status`; returns the job's exit status."""
    attempt, job = run.attempt(attempt_number()), own_job()
    if attempt.read(Result) is not None:  # rank 0 finished; other tasks may have been lost with their nodes
        attempt.note(Outcome(state="done"))
        return 0
    ended = "cancelled" if run.cancelled else patiently(lambda: who_ends(job, attempt.number))
    stopped = attempt.read(Stopped)
    if ended == "preempted" or (stopped is not None and stopped.why == "signal"):
        # the tasks had no time to ask Slurm, or could not, as from a container
        told = "preempted" if ended in ("requeued", "preempted") else ended
        stopped = Stopped(why=told or patiently(lambda: why_told(job, run.profile().save_seconds)))
        attempt.note(stopped)
    if ended == "cancelled" or (ended == "preempted" and run.profile().chain == 1):
        attempt.note(Outcome(state="cancelled"))
        return KILLED + signal.SIGTERM
    reason = why(attempt, status)
    if ended == "requeued":  # by Slurm for another job, or by an administrator
        attempt.note(Outcome(state="again", reason=reason))
        return 1
    if ended == "time limit" and stopped is None:
        reason = "its time limit was reached before it had saved"
    failure = attempt.failure()
    if failure and failure.kind == "user":
        attempt.note(Outcome(state="failed", reason=reason))
        return 2
    if attempt.why_last is None and (streak := fruitless(run.attempts())) > run.profile().retries:
        return _give_up(attempt, streak, reason)
    return _start_again(run, attempt, reason)


def _start_again(run: Run, attempt: Attempt, reason: str) -> int:
    """Have the job requeued, or leave the rest to the next of its chain; returns the exit status."""
    if (last := attempt.why_last) is not None:
        attempt.note(Outcome(state="failed", reason=f"{reason}; {last}"))
        return 1
    attempt.note(Outcome(state="again", reason=reason))
    if run.profile().chain > 1:
        console.error(f"{reason}; the next job of the chain continues")
        return 1
    console.error(f"{reason}; the job is started again")
    try:
        patiently(lambda: requeue_job(own_job(), attempt.number))
    except WorkError as error:
        reason += f"; and Slurm did not requeue the job: {error}"
        attempt.note(Outcome(state="failed", reason=reason))
        return 1
    attempt.close()
    # If the script ends before Slurm's signal arrives, the job may count as failed (seen with 22.05): wait
    # for it.
    time.sleep(OUTAGE_SECONDS)
    return 1


def _give_up(attempt: Attempt, streak: int, reason: str) -> int:
    text = f"given up: {streak} attempts in a row made no progress; the last: {reason}"
    attempt.note(Outcome(state="failed", reason=text))
    console.error(text)
    return 1


def _cancelling_others(run: Run, status: int) -> int:
    """Cancel the jobs of a chain or array that wait if nothing is left for them to do; returns `status`.

    If that fails, those that begin all the same end at once: this job's own outcome stands.
    """
    failures = (UserError, WorkError, OSError)
    with contextlib.suppress(*failures):
        if (array := run.whole.record()).array is not None and _array_is_done(run):
            cancel_jobs([str(array.job)], pending=True)
    with contextlib.suppress(*failures):
        later, attempts = run.record().jobs[attempt_number() + 1 :], run.attempts()
        if later and attempts and _over(attempts[-1]) is not None:
            cancel_jobs(later)
    return status


def main(words: Sequence[str]) -> int:
    run = Run(Path(words[1]))
    try:
        if words[0] == "begin":
            return _cancelling_others(run, begin(run))
        attempt = run.attempt(attempt_number())
        try:
            return _cancelling_others(run, end(run, int(words[2])))
        except OSError as error:  # a disk that fails: whatever it hides, the job is started again
            return _start_again(run, attempt, str(error))
        finally:
            attempt.close()
    except (UserError, WorkError, OSError) as error:
        console.error(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
