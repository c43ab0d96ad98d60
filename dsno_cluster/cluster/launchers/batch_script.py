"""The batch script of a stage, as submitit's executor writes it for sbatch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import submitit

from dsno_cluster.cluster.attempt import FINISHED
from dsno_cluster.cluster.launchers.containers import container_setup, container_words
from dsno_cluster.cluster.runs import ARRAY, BATCH_LOG
from dsno_cluster.cluster.stage import Submission
from dsno_cluster.cluster.submitit_internals import MOST_REQUEUES
from dsno_cluster.cluster.task import PLACE_IN_CHAIN


def executor_for(
    submission: Submission, folder: Path, after: Sequence[str] = (), earlier: Sequence[str] = ()
) -> submitit.SlurmExecutor:
    """submitit's executor for a run folder, which need not exist yet.

    `after` are the jobs of the run that this one waits for, `earlier` those before this job in its own chain.
    """
    stage, profile = submission.stage, submission.profile
    # an array's tasks have folders of their own; sbatch has a sign for their numbers, the shell a variable
    run, logs = shlex.quote(str(folder)), folder
    if submission.array > 1:
        run, logs = f"{run}/{ARRAY}/$SLURM_ARRAY_TASK_ID", folder / ARRAY / "%a"
    ray, container = stage.kind == "ray", profile.container
    python = shlex.quote(sys.executable)
    in_srun, task = ([], [python]) if container is None else container_words(container, submission)
    # a Ray stage continues without a lost node, but not from a container, in which nobody can ask Slurm to start the job
    # again if it is the first; in a training the other ranks must not wait for a lost one
    no_kill = ray and container is None
    srun = [
        *("srun", "--unbuffered", "--export=ALL", f"--cpus-per-task={profile.cpus_per_task}"),
        f"--output={run}/attempts/$attempt/task-%t.log",
        *(["--no-kill"] if no_kill else []),
        f"--kill-on-bad-exit={0 if ray else 1}",
        *in_srun,
    ]
    dependency = _dependency(after, earlier)
    executor = submitit.SlurmExecutor(
        folder=folder / "submitit",
        max_num_timeout=MOST_REQUEUES,  # submitit takes any signal to a job of under ten minutes for a time-out
        python=" ".join([*srun, *task]),
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
        dependency=dependency,
        wckey=None,
        use_srun=False,  # our own srun line has log files per attempt
        setup=_setup_lines(submission, folder, run, len(earlier)),
        teardown=[f"{python} -m dsno_cluster.cluster.attempt end {run} $?"],
        array_parallelism=submission.array,
        additional_parameters={
            "output": logs / BATCH_LOG,
            "error": logs / BATCH_LOG,
            **({"requeue": True} if profile.requeue else {}),
            **({"no_kill": True} if no_kill and profile.nodes > 1 else {}),
            **({"kill_on_invalid_dep": "yes"} if dependency else {}),
            **profile.sbatch_options,
        },
    )
    return executor


def _dependency(after: Sequence[str], earlier: Sequence[str]) -> str | None:
    """When a job may begin: when all `earlier` ones of its chain have failed, or one of those `after` which it comes has not.

    All earlier ones, so that it waits for the one that runs if somebody cancels another that waits.
    """
    if earlier:
        return f"afternotok:{':'.join(earlier)}"
    return "?".join(f"afterok:{job}" for job in after) or None


def _setup_lines(submission: Submission, folder: Path, run: str, place: int) -> list[str]:
    """The lines of the batch script before srun: the profile's setup, then ours.

    `run` is the folder of the run, or of a task of its array, for the shell. `place` is the job's in its chain.
    """
    profile, python, here = submission.profile, shlex.quote(sys.executable), shlex.quote(os.getcwd())
    lines = [*profile.setup, *(["set +e  # what follows reads exit statuses"] if profile.setup else [])]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in profile.environment.items()]
    lines += [
        "# the code as it was at submission, then the folder of submission, for teachers of your own",
        f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(folder))}/code:{here}${{PYTHONPATH:+:$PYTHONPATH}}",
        "attempt=${SLURM_RESTART_COUNT:-0}"
        if profile.chain == 1
        else f"export {PLACE_IN_CHAIN}={place}; attempt={place}",
        *container_setup(submission),
        "trap : TERM  # the signal is for the tasks; this script waits for them",
        "export SUBMITIT_LOG_LEVEL=${SUBMITIT_LOG_LEVEL:-ERROR}",
    ]
    if submission.stage.kind == "ray":
        lines += [
            "# the token with which Ray's processes authenticate; new for each attempt, printed nowhere",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')",
        ]
    begin = f"{python} -m dsno_cluster.cluster.attempt begin {run} ||"
    if profile.chain == 1 and submission.array == 1:
        return [*lines, f"{begin} exit $?"]
    return [*lines, f"{begin} exit $(($? == {FINISHED} ? 0 : $?))  # {FINISHED}: the run is finished already"]
