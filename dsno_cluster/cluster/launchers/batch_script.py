"""The batch script of a stage, as submitit's executor writes it for sbatch."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import submitit

from dsno_cluster.cluster.runs import BATCH_LOG
from dsno_cluster.cluster.stage import Submission
from dsno_cluster.cluster.submitit_internals import MOST_REQUEUES
from dsno_cluster.config import Profile


def executor_for(submission: Submission, folder: Path, after: str | None) -> submitit.SlurmExecutor:
    """submitit's executor for a run folder, which need not exist yet."""
    stage, profile = submission.stage, submission.profile
    ray = stage.kind == "ray"
    srun = [
        *("srun", "--unbuffered", "--export=ALL", f"--cpus-per-task={profile.cpus_per_task}"),
        f"--output={shlex.quote(str(folder))}/attempts/$attempt/task-%t.log",
        # a Ray stage continues without a lost node; in a training the other ranks must not wait for a lost
        # one
        *(("--no-kill", "--kill-on-bad-exit=0") if ray else ("--kill-on-bad-exit=1",)),
    ]
    python = shlex.quote(sys.executable)
    executor = submitit.SlurmExecutor(
        folder=folder / "submitit",
        max_num_timeout=MOST_REQUEUES,  # submitit takes any signal to a job of under ten minutes for a time-out
        python=f"{' '.join(srun)} {python}",
    )
    executor.update_parameters(
        job_name=f"{stage.name}-{submission.config.name}",
        nodes=profile.nodes,
        ntasks_per_node=profile.tasks_per_node,
        cpus_per_task=profile.cpus_per_task,
        gpus_per_node=profile.gpus_per_node or None,  # a cluster without GPUs refuses even a request for none
        mem=f"{profile.mem_gb}GB",
        time=profile.time_minutes,
        partition=profile.partition,
        account=profile.account,
        qos=profile.qos,
        constraint=profile.constraint,
        signal_delay_s=profile.save_seconds,
        dependency=f"afterok:{after}" if after else None,
        wckey=None,
        use_srun=False,  # our own srun line has log files per attempt
        setup=_setup_lines(folder, profile, ray),
        teardown=[f"{python} -m dsno_cluster.cluster.attempt end {shlex.quote(str(folder))} $?"],
        additional_parameters={
            "output": folder / BATCH_LOG,
            "error": folder / BATCH_LOG,
            **({"requeue": True} if profile.requeue else {}),
            **({"no_kill": True} if ray and profile.nodes > 1 else {}),
            **({"kill_on_invalid_dep": "yes"} if after else {}),
            **profile.sbatch_options,
        },
    )
    return executor


def _setup_lines(folder: Path, profile: Profile, ray: bool) -> list[str]:
    """The lines of the batch script before srun: the profile's setup, then ours."""
    run, python = shlex.quote(str(folder)), shlex.quote(sys.executable)
    here = shlex.quote(os.getcwd())
    lines = [*profile.setup, *(["set +e  # what follows reads exit statuses"] if profile.setup else [])]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in profile.environment.items()]
    lines += [
        "# the code as it was at submission, then the folder of submission, for teachers of your own",
        f"export PYTHONSAFEPATH=1 PYTHONPATH={run}/code:{here}${{PYTHONPATH:+:$PYTHONPATH}}",
        "attempt=${SLURM_RESTART_COUNT:-0}",
        "trap : TERM  # the signal is for the tasks; this script waits for them",
        "export SUBMITIT_LOG_LEVEL=${SUBMITIT_LOG_LEVEL:-ERROR}",
    ]
    if ray:
        lines += [
            "# the token with which Ray's processes authenticate; new for each attempt, printed nowhere",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')",
        ]
    return [*lines, f"{python} -m dsno_cluster.cluster.attempt begin {run} || exit $?"]
