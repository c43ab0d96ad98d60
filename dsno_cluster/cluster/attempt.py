"""Run by the batch script before and after each attempt at a job: `python -m dsno_cluster.cluster.attempt begin|end RUN`.

`begin` makes the attempt's folder, or refuses where former attempts gained nothing too often. `end STATUS` says how the
attempt ended: the job is done, is started again (a node, a network or a library failed it, and it may do better), or is
given up. Its exit status is the job's, which is what Slurm's `afterok` goes by.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dsno_cluster.cluster.runs import Attempt, Run, fruitless
from dsno_cluster.cluster.slurm import requeue_job, who_ends
from dsno_cluster.cluster.task import attempt_number

KILLED = 128
STOPS = {
    "time limit": "its time limit was near",
    "preempted": "its nodes were wanted by another job or an administrator",
}


def begin(run: Run) -> int:
    """Open this attempt; returns 0, or the status to leave with."""
    attempt = run.attempt(attempt_number())
    former = [a for a in run.attempts() if a.number < attempt.number]
    attempt.folder.mkdir(parents=True, exist_ok=True)
    attempt.write("begin", job=os.environ.get("SLURM_JOB_ID"), nodes=os.environ.get("SLURM_JOB_NODELIST"))
    if run.cancelled:
        attempt.write("outcome", state="cancelled", reason="cancelled before it began")
        return 1
    if (streak := fruitless(former)) > run.profile().retries:
        return give_up(attempt, streak, why(former[-1], None), 1)
    return 0


def end(run: Run, status: int) -> int:
    """Close this attempt, whose srun ended with `status`; returns the job's exit status."""
    attempt, job = run.attempt(attempt_number()), os.environ["SLURM_JOB_ID"]
    if attempt.read("result") is not None:  # rank 0 finished; other tasks may have been lost with their nodes
        attempt.write("outcome", state="done", reason="")
        return 0
    ended = "cancelled" if run.cancelled else who_ends(job, attempt.number)
    if ended == "cancelled":
        attempt.write("outcome", state="cancelled", reason="")
        return KILLED + signal.SIGTERM
    if (
        ended == "requeued"
    ):  # by the task that was told to leave, by Slurm for another job, or by an administrator
        attempt.write("outcome", state="again", reason=why(attempt, None))
        return 1
    reason = (
        "its time limit was reached before it had saved" if ended == "time limit" else why(attempt, status)
    )
    failure = attempt.failure()
    if failure is not None and failure["kind"] == "user":
        attempt.write("outcome", state="failed", reason=reason)
        return 2
    if (streak := fruitless(run.attempts())) > run.profile().retries:
        return give_up(attempt, streak, reason, 1)
    attempt.write("outcome", state="again", reason=reason)
    print(f"dsno-cluster: {reason}; the job is started again", flush=True)
    if requeue_job(job):
        time.sleep(60)  # Slurm ends this script
    attempt.write("outcome", state="failed", reason=f"{reason}; and Slurm did not requeue the job")
    return 1


def give_up(attempt: Attempt, streak: int, reason: str, status: int) -> int:
    text = f"given up: {streak} attempts in a row gained nothing; the last: {reason}"
    attempt.write("outcome", state="failed", reason=text)
    print(f"dsno-cluster: {text}", flush=True)
    return status


def why(attempt: Attempt, status: int | None) -> str:
    """What is known of why an attempt ended, in a line. `status` None: its batch script did not live to see it."""
    failure, stopped = attempt.failure(), attempt.read("stopped")
    if failure is not None:
        return str(failure["reason"])
    if stopped is not None:
        return STOPS.get(str(stopped["why"]), str(stopped["why"]))
    if status is None:
        nodes = (attempt.read("begin") or {}).get("nodes")
        return f"it was killed from outside with its batch script, such as by the loss of a node ({nodes})"
    if status > KILLED:
        name = signal.Signals(status - KILLED).name if status - KILLED in set(signal.Signals) else "a signal"
        memory = ", perhaps for want of memory (mem_gb)" if status - KILLED == signal.SIGKILL else ""
        return f"a task was killed by {name}{memory}; see {attempt.folder}"
    return f"srun ended with status {status} and no task said why; see {attempt.folder} and batch.log"


def main(words: Sequence[str]) -> int:
    run = Run(Path(words[1]))
    return begin(run) if words[0] == "begin" else end(run, int(words[2]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
