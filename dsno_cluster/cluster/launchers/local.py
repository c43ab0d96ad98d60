"""This machine: a training with several processes becomes a run; the command itself does everything else."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsno_cluster import console
from dsno_cluster.cluster.launchers.protocol import State
from dsno_cluster.cluster.records import Result
from dsno_cluster.cluster.rendezvous import free_ports
from dsno_cluster.cluster.runs import BATCH_LOG, Run, create_run
from dsno_cluster.config import load_profile
from dsno_cluster.errors import UserError, WorkError

if TYPE_CHECKING:
    import psutil

    from dsno_cluster.cluster.stage import Stage, Submission
    from dsno_cluster.config import Profile

POLL_SECONDS = 0.5
STARTED_SECONDS = (
    60.0  # a process that began later than this after its run was submitted is another one with the same id
)
ENDING_SECONDS = 10.0  # the ranks get a second to end by themselves


class LocalLauncher:
    """Processes on this machine, started and ended by submitit's local executor."""

    name = "local"
    detached = False

    def profile(self, stage: Stage[Any], nodes: int | None, tasks_per_node: int | None) -> Profile:
        """The profile describes a cluster.

        Here it has one node, and one process unless more were asked for.
        """
        return load_profile(stage.name, {"nodes": 1, "tasks_per_node": tasks_per_node or 1})

    def takes(self, submission: Submission) -> bool:
        return submission.stage.kind == "ranks" and submission.profile.tasks_per_node > 1

    def describe(self, submission: Submission) -> None:
        return None

    def check(self, submission: Submission) -> None:
        """Raises UserError for an array, and for more ranks than GPUs, if this machine has any."""
        from dsno_cluster.device import too_many_ranks, visible_gpus

        if submission.array > 1:
            raise UserError(
                f"--array {submission.array}: an array is for Slurm; on this machine --actors says how many work"
            )
        if self.takes(submission):
            ranks = submission.profile.tasks_per_node
            if 0 < (gpus := visible_gpus()) < ranks:  # all of them see the same ones
                raise too_many_ranks(ranks, gpus)

    def submit(self, submissions: Sequence[Submission]) -> list[Run]:
        """Start one stage; the command itself runs several one after the other."""
        from dsno_cluster.cluster.submitit_internals import start_on_this_machine
        from dsno_cluster.cluster.task import StageTask

        (submission,) = submissions
        self.check(submission)
        run, tasks = create_run(submission, snapshot=False), submission.profile.tasks_per_node
        task = StageTask(submission.stage, submission.options, str(run.folder))
        variables = {"MASTER_PORT": str(free_ports(1)[0])}  # the port at which the ranks find each other
        job = start_on_this_machine(task, run.folder / "submitit", tasks, run.folder / BATCH_LOG, variables)
        run.note(job=job, launcher=self.name, host=socket.gethostname())
        console.say(f"{submission.stage.name} in {tasks} processes; logs: {run.folder}/submitit")
        return [run]

    def states(self, runs: Sequence[Run]) -> dict[Run, State]:
        return {run: self._state(run) for run in runs}

    def _state(self, run: Run) -> State:
        record, attempts = run.record(), run.attempts()
        last = attempts[-1] if attempts else None
        if last is not None and last.read(Result) is not None:
            return State("done")
        if record.host != socket.gethostname():
            return State("state unknown", f"it is on {record.host}")
        if _controller(run) is not None:
            return State("running", "", "this machine")
        if run.cancelled:
            return State("cancelled")
        failure = last.failure() if last is not None else None
        return State("failed", failure.reason if failure else "its processes ended without a reason")

    def follow(self, run: Run) -> str:
        """Show what rank 0 prints until the run ends; returns its result.

        Ctrl-C ends the run. Raises UserError or WorkError with the reason of the rank that failed.
        """
        shown = 0
        try:
            while True:
                ended = _controller(run) is None
                log = self.logs(run, 0, None)
                text = log.read_text() if log is not None else ""
                complete = text.rfind("\n") + 1
                for line in text[shown:complete].splitlines():
                    if not line.startswith(("submitit ", "dsno-cluster: ")):
                        console.say(line)
                shown = max(shown, complete)
                if ended:
                    break
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            self._interrupt(run)
            raise
        attempt = run.attempt(0)
        if (result := attempt.read(Result)) is not None:
            return result.result
        failure = attempt.failure()
        if failure is None or failure.kind == "bug":
            raise WorkError(
                f"{run.id} failed: {failure.reason if failure else 'no rank said why'}; logs: {run.folder}/submitit"
            )
        raise (UserError if failure.kind == "user" else WorkError)(failure.reason)

    def _interrupt(self, run: Run) -> None:
        """End a run: its ranks save and leave; a second Ctrl-C ends them at once."""
        console.say("interrupted: the ranks save at their next step; Ctrl-C again ends them at once")
        try:
            self.cancel(run)
            while _controller(run) is not None:
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            if (controller := _controller(run)) is not None:
                controller.send_signal(signal.SIGINT)  # it kills the ranks after a second
            for _ in range(int(ENDING_SECONDS / POLL_SECONDS)):
                if _controller(run) is None:
                    break
                time.sleep(POLL_SECONDS)
            raise

    def logs(self, run: Run, rank: int, attempt: int | None) -> Path | None:
        found = sorted(run.folder.glob(f"submitit/*_{rank}_log.err"))
        return found[-1] if found else None

    def cancel(self, run: Run) -> None:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(int(str(run.record().job))).children():
                rank.send_signal(signal.SIGINT)


def _controller(run: Run) -> psutil.Process | None:
    """The process that started the ranks and ends with them; None if it has ended."""
    import psutil

    record = run.record()
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(int(str(record.job)))
        ours = found.create_time() <= record.submitted + STARTED_SECONDS
        if ours and found.is_running() and found.status() != psutil.STATUS_ZOMBIE:
            return found
    return None
