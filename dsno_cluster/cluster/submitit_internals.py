"""All uses of submitit beyond its public interface.

`pyproject.toml` bounds submitit's version, and a test compares what is used here with the library. Three things
have no public interface: the text of a batch script before it is submitted, a local job in its own session, and
the end of a local job of which one rank has failed. Run as a module, this is the controller of a local job: the
process that starts the ranks and ends with them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import submitit
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE, Controller, LocalJob
from submitit.slurm.slurm import _make_sbatch_string

MOST_REQUEUES = 1000
MINUTES = 30 * 24 * 60  # submitit requires a time limit, even for a local job
# how long the other ranks may take to end by themselves, and to say why, if one has failed
ALONE_SECONDS, LOOK_SECONDS = 30.0, 0.2


def script_text(executor: submitit.SlurmExecutor, array: int = 1) -> str:
    """The batch script that an executor hands to sbatch, for an array of so many tasks if it is more than one."""
    parameters = executor.parameters | ({"map_count": array} if array > 1 else {})
    return str(_make_sbatch_string(executor._submitit_command_str, executor.folder, **parameters))


def start_on_this_machine(
    task: Callable[[], str], folder: Path, tasks: int, errors: Path, variables: dict[str, str]
) -> str:
    """Start a picklable task in several processes, with environment `variables`; returns the id of their controller.

    They have their own session, so that Ctrl-C at a terminal does not reach them. The controller writes its
    standard error, such as a traceback when it is interrupted, to `errors`.
    """
    executor = _OwnSession(folder, errors, variables)
    executor.update_parameters(tasks_per_node=tasks, timeout_min=MINUTES)
    return str(executor.submit(task).job_id)


class _OwnSession(submitit.LocalExecutor):
    """submitit's local executor, with a new session, a file for standard error and the caller's CUDA devices."""

    def __init__(self, folder: Path, errors: Path, variables: dict[str, str]) -> None:
        super().__init__(folder, max_num_timeout=MOST_REQUEUES)
        self.errors, self.variables = errors, variables

    def _submit_command(self, command: str) -> Any:
        tasks = self.parameters["tasks_per_node"]
        with self.errors.open("a") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.folder)],
                env=os.environ | self.variables | controller_variables(command, tasks),
                stderr=errors,
                start_new_session=True,
            )
        return LocalJob(
            folder=self.folder, job_id=str(process.pid), process=process, tasks=list(range(tasks))
        )


def controller_variables(command: str, tasks: int) -> dict[str, str]:
    """The environment variables that the controller reads."""
    return {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_COMMAND": command,
        "SUBMITIT_LOCAL_NTASKS": str(tasks),
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * MINUTES),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_STDERR_TO_STDOUT": "",
    }


class _EndsTogether(Controller):
    """submitit's controller, which also ends all ranks if one of them has failed: with NCCL the others wait for it."""

    def start_tasks(self) -> None:
        super().start_tasks()
        threading.Thread(target=self._watch, args=(list(self.tasks),), daemon=True).start()

    def _watch(self, ranks: list[subprocess.Popen[str]]) -> None:
        alone, noted = 0.0, set[int]()
        while True:
            live = [rank for rank in ranks if rank.poll() is None]
            for number, rank in enumerate(ranks):
                if rank.returncode not in (None, 0, LOCAL_REQUEUE_RETURN_CODE) and number not in noted:
                    noted.add(number)
                    self._note(number, rank.returncode)
            if not live:
                return
            if noted and (alone := alone + LOOK_SECONDS) > ALONE_SECONDS:
                for rank in live:
                    rank.kill()
                return
            time.sleep(LOOK_SECONDS)

    def _note(self, number: int, status: int) -> None:
        """Note how a rank ended that could not note it itself; SIGINT is how people end a job."""
        from dsno_cluster.cluster.records import Failure
        from dsno_cluster.cluster.runs import Run

        if status < 0 and -status != signal.SIGINT and self.tasks:
            host, name = socket.gethostname(), signal.Signals(-status).name
            reason = f"rank {number} on {host} was ended by {name}; the same command resumes"
            run = Run(self.folder.parent)
            run.attempt(0).note(Failure(kind="work", reason=reason, rank=number, host=host))


if __name__ == "__main__":
    _EndsTogether(Path(sys.argv[1])).run()
