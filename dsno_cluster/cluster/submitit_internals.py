"""All uses of submitit beyond its public interface.

`pyproject.toml` bounds submitit's version, and a test compares what is used here with the library. Two things
have no public interface: the text of a batch script before it is submitted, and a local job in its own
session.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import submitit
from submitit.local.local import LocalJob

MOST_REQUEUES = 1000
MINUTES = 30 * 24 * 60  # submitit requires a time limit, even for a local job
CONTROLLER = "submitit.local._local"  # the module that starts the ranks of a local job and ends with them


def script_text(executor: submitit.SlurmExecutor) -> str:
    """The batch script that an executor hands to sbatch."""
    return str(executor._make_submission_file_text(executor._submitit_command_str, "uid"))


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
                [sys.executable, "-m", CONTROLLER, str(self.folder)],
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
