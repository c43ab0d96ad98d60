"""Following a stage that runs in several processes on this machine, to its end or to Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

from dsno_cluster import console
from dsno_cluster.cluster.runs import Run
from dsno_cluster.errors import UserError, WorkError

POLL_SECONDS = 0.5


def follow(run: Run, job: Any) -> str:
    """Show what rank 0 of a local job prints until it ends; returns the task's result.

    Ctrl-C ends the job. Raises UserError or WorkError with the reason of the rank that failed.
    """
    first = Path(str(job.paths.stderr).replace("%t", "0"))
    shown = 0
    try:
        while True:
            ended = job.done()
            text = first.read_text() if first.is_file() else ""
            complete = text.rfind("\n") + 1
            for line in text[shown:complete].splitlines():
                if not line.startswith(("submitit ", "dsno-cluster: ")):
                    console.say(line)
            shown = max(shown, complete)
            if ended:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        _interrupt(job)
        raise
    attempt = run.attempt(0)
    if (result := attempt.read("result")) is not None:
        return str(result["result"])
    failure = attempt.failure()
    if failure is None or failure["kind"] == "bug":
        raise WorkError(
            f"{run.id} failed: {failure['reason'] if failure else 'no rank said why'}; logs: {run.folder}/submitit"
        )
    raise (UserError if failure["kind"] == "user" else WorkError)(failure["reason"])


def _interrupt(job: Any) -> None:
    """End a local job: its ranks save and leave; a second Ctrl-C ends them at once."""
    import psutil

    console.say("interrupted: the ranks save at their next step; Ctrl-C again ends them at once")
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(int(job.job_id)).children():
                child.send_signal(signal.SIGINT)
        while not job.done():
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        job.cancel()
        for _ in range(int(10 / POLL_SECONDS)):  # the ranks have a second to end by themselves
            if job.done():
                break
            time.sleep(POLL_SECONDS)
        raise
