"""Submitting stages through submitit: to Slurm, or to several processes on this machine.

One path for all stages: a run folder, a `StageTask` that holds text only, an executor made from the profile.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsno_cluster import console
from dsno_cluster.cluster.rendezvous import free_ports
from dsno_cluster.cluster.runs import BATCH_LOG, Run, all_runs, create_run
from dsno_cluster.cluster.slurm import check_profile, cluster_name, controller_silence, refusal
from dsno_cluster.cluster.task import StageTask
from dsno_cluster.config import Config, Profile, dump_config
from dsno_cluster.errors import UserError, WorkError

MOST_REQUEUES = 1000
# keys of a profile for which sbatch has the user's own defaults
LEFT_OUT = ("partition", "account", "qos", "constraint")


def choose_launcher(asked: str, nodes: int, profile_nodes: int = 1) -> str:
    """`local` or `slurm`. auto is Slurm where sbatch is on PATH and the controller answers within 2 s.

    Raises UserError for slurm without sbatch and for several `nodes` on this machine alone, and WorkError for
    slurm whose controller does not answer, and for auto with such a one where the profile asks for several nodes: work
    of that size does not belong on a login node.
    """
    sbatch = shutil.which("sbatch")
    if asked == "slurm":
        if sbatch is None:
            raise UserError(
                "--launcher slurm: there is no sbatch on PATH; load Slurm's module, or take --launcher local"
            )
        silence = controller_silence()
        if silence:
            raise WorkError(
                f"--launcher slurm: {silence}; try again when it answers, or take --launcher local"
            )
        return "slurm"
    why = "as asked"
    if asked == "auto":
        silence = controller_silence() if sbatch else "there is no sbatch on PATH"
        if not silence:
            return "slurm"
        if sbatch and profile_nodes > 1:
            raise WorkError(
                f"{silence}, and the profile asks for {profile_nodes} nodes; try again when it answers"
            )
        why = silence
        console.say(f"running on this machine: {silence} (--launcher local asks nobody)")
    if nodes > 1:
        raise UserError(
            f"--nodes {nodes}: the local launcher ({why}) has one node; several need --launcher slurm"
        )
    return "local"


def submit_to_slurm(
    task: StageTask, config: Config, profile: Profile, command_line: str, after: str | None = None
) -> Run:
    """Submit a stage to Slurm, to begin when job `after` is done; returns its run, whose record has the job's id.

    Raises UserError for a job that Slurm could never run, and WorkError where the same stage is under way already.
    """
    from submitit.core.utils import FailedJobError

    stage = task.stage
    check_room(stage, config, profile)
    check_profile(profile, f"jobs/{stage}.yaml")
    refuse_second(config, task)
    cluster = cluster_name()
    run = create_run(config, stage, profile, command_line, snapshot=True)
    executor = _slurm_executor(run.folder, config, stage, profile, after)
    try:
        with _clean_environment(profile), _undisturbed():
            (run.folder / "script.sh").write_text(_script_text(executor))
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it then raises
                job = executor.submit(task_in(run, task))
            run.note(
                job=str(job.job_id), launcher="slurm", cluster=cluster, after=after, subject=task.subject
            )
    except FailedJobError as error:
        _forget(run)
        raise refusal(str(error)) from error
    except BaseException:  # Ctrl-C among them
        if "job" in run.record():
            _take_back(run)
        else:
            _forget(run)
        raise
    return run


def submit_pipeline(config: Config, profiles: dict[str, Profile], command_line: str) -> list[Run]:
    """Submit stages, in the order of `profiles`, each to begin when the one before is done.

    Where one is refused, or at Ctrl-C, those before it are cancelled again. Raises as `submit_to_slurm`.
    """
    for stage, profile in profiles.items():
        check_room(stage, config, profile)
        check_profile(profile, f"jobs/{stage}.yaml")
        refuse_second(config, stage_task(stage, config))
    runs: list[Run] = []
    try:
        with _undisturbed():
            for stage, profile in profiles.items():
                after = str(runs[-1].record()["job"]) if runs else None
                runs.append(submit_to_slurm(stage_task(stage, config), config, profile, command_line, after))
    except BaseException:
        for run in runs:
            _take_back(run)
        raise
    return runs


def sbatch_script(stage: str, config: Config, profile: Profile) -> str:
    """The script that `submit_to_slurm` hands to sbatch, for --dry-run; RUN stands for the run folder to come."""
    check_room(stage, config, profile)
    folder = config.run_dir.absolute() / "jobs" / "RUN"
    return _script_text(_slurm_executor(folder, config, stage, profile, None))


def submit_locally(task: StageTask, config: Config, profile: Profile, command_line: str) -> tuple[Run, Any]:
    """Start a stage in several processes on this machine; returns its run and submitit's job."""
    import submitit
    import torch

    run = create_run(config, task.stage, profile, command_line, snapshot=False)
    executor = submitit.AutoExecutor(
        folder=run.folder / "submitit", cluster="local", local_max_num_timeout=MOST_REQUEUES
    )
    executor.update_parameters(
        name=f"{task.stage}-{config.name}",
        nodes=1,  # the profile is a cluster's; here are one node, every GPU, and no time limit but a month
        tasks_per_node=profile.tasks_per_node,
        gpus_per_node=torch.cuda.device_count(),
        timeout_min=30 * 24 * 60,
    )
    # submitit's ranks find each other on this machine at a port that is free now
    os.environ["MASTER_PORT"] = str(free_ports(1)[0])
    # submitit's controller of local jobs inherits standard error, and ends with a traceback when it is cancelled
    with _standard_error_into(run.folder / BATCH_LOG), _own_sessions():
        job = executor.submit(task_in(run, task))
    run.note(job=str(job.job_id), launcher="local", host=socket.gethostname())
    return run, job


def stage_task(stage: str, config: Config, **options: Any) -> StageTask:
    """The task of a stage with its options (`StageTask`)."""
    return StageTask(stage, dump_config(config), "", **options)


def task_in(run: Run, task: StageTask) -> StageTask:
    """The task with the folder of its run."""
    return replace(task, run_folder=str(run.folder))


def check_room(stage: str, config: Config, profile: Profile) -> None:
    """Raises UserError where a node's CPUs hold no actor of a Ray stage, or fewer than it has GPUs."""
    if stage == "train":
        return
    section = "trajectories" if stage == "gen-trajectories" else "evaluation"
    threads: int = getattr(config, section).threads
    wanted = max(1, profile.gpus_per_node)
    if profile.cpus_per_task < threads * wanted:
        what = f"its {wanted} GPUs have an actor each" if wanted > 1 else "it has one actor at least"
        raise UserError(
            f"jobs/{stage}.yaml: cpus_per_task {profile.cpus_per_task} of a node: {what}, of {section}.threads={threads} CPUs; "
            f"raise cpus_per_task to {threads * wanted}"
        )


def refuse_second(config: Config, task: StageTask) -> None:
    """Raises WorkError where the same stage of the same experiment waits or runs already, on the same subject."""
    from dsno_cluster.cluster.status import LIVE, states_of

    wanted = {
        "stage": task.stage,
        "name": config.name,
        "root": config.storage.root,
        "launcher": "slurm",
        "subject": task.subject,
    }
    same = [run for run in all_runs() if wanted.items() <= ({"subject": ""} | run.record()).items()]
    for run, state in states_of(same).items():
        if state.word in LIVE:
            job = run.record()["job"]
            raise WorkError(
                f"{task.stage} of {config.name} is {state.word} already, as job {job}: "
                f"follow it with `dsno-cluster logs {run.id} --follow`, or end it with `dsno-cluster cancel {run.id}`"
            )


def _slurm_executor(folder: Path, config: Config, stage: str, profile: Profile, after: str | None) -> Any:
    """submitit's executor for a run folder, which need not be there yet."""
    import submitit

    ray = stage != "train"
    srun = [
        *("srun", "--unbuffered", "--export=ALL", f"--cpus-per-task={profile.cpus_per_task}"),
        f"--output={shlex.quote(str(folder))}/attempts/$attempt/task-%t.log",
        # of the Ray stages a lost node is done without; of training a lost rank is no reason for others to wait
        *(("--no-kill", "--kill-on-bad-exit=0") if ray else ("--kill-on-bad-exit=1",)),
    ]
    python = shlex.quote(sys.executable)
    executor = submitit.SlurmExecutor(
        folder=folder / "submitit",
        max_num_timeout=MOST_REQUEUES,  # it takes any signal to a job of under ten minutes for a time-out
        python=f"{' '.join(srun)} {python}",
    )
    parameters: dict[str, Any] = {
        "job_name": f"{stage}-{config.name}",
        "nodes": profile.nodes,
        "ntasks_per_node": profile.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        # a cluster without GPUs refuses even a request for none
        "gpus_per_node": profile.gpus_per_node or None,
        "mem": f"{profile.mem_gb}GB",
        "time": profile.time_minutes,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "signal_delay_s": profile.save_seconds,
        "dependency": f"afterok:{after}" if after else None,
        "wckey": None,
        "use_srun": False,  # the srun line is ours: its log files tell attempts apart
        "setup": _setup_lines(folder, profile, ray),
        "teardown": [f"{python} -m dsno_cluster.cluster.attempt end {shlex.quote(str(folder))} $?"],
        "additional_parameters": {
            "output": folder / BATCH_LOG,
            "error": folder / BATCH_LOG,
            **({"requeue": True} if profile.requeue else {}),
            **({"no_kill": True} if ray and profile.nodes > 1 else {}),
            **({"kill_on_invalid_dep": "yes"} if after else {}),
            **profile.sbatch_options,
        },
    }
    executor.update_parameters(**parameters)
    return executor


def _setup_lines(folder: Path, profile: Profile, ray: bool) -> list[str]:
    """What the batch script does before srun: the owner's lines, then ours."""
    run, python = shlex.quote(str(folder)), shlex.quote(sys.executable)
    here = shlex.quote(os.getcwd())
    lines = [*profile.setup, *(["set +e  # what follows reads exit statuses"] if profile.setup else [])]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in profile.environment.items()]
    lines += [
        "# the code as it was at submission, then the folder of submission, for teachers of your own",
        f"export PYTHONSAFEPATH=1 PYTHONPATH={run}/code:{here}${{PYTHONPATH:+:$PYTHONPATH}}",
        "attempt=${SLURM_RESTART_COUNT:-0}",
        "trap : TERM  # the tasks are told to end; this script waits for them",
        "export SUBMITIT_LOG_LEVEL=${SUBMITIT_LOG_LEVEL:-ERROR}",
    ]
    if ray:
        lines += [
            "# what Ray's processes show each other; made anew for each attempt, shown nowhere",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')",
        ]
    return [*lines, f"{python} -m dsno_cluster.cluster.attempt begin {run} || exit $?"]


def _script_text(executor: Any) -> str:
    return str(executor._make_submission_file_text(executor._submitit_command_str, "uid"))


def _forget(run: Run) -> None:
    """Delete a run folder whose job was not submitted."""
    from dsno_cluster.cluster.runs import index

    shutil.rmtree(run.folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        (index() / run.id).unlink()


def _take_back(run: Run) -> None:
    """Cancel a job that was just submitted."""
    from dsno_cluster.cluster.slurm import cancel_job

    run.cancel()
    with contextlib.suppress(WorkError):
        cancel_job(str(run.record()["job"]))


@contextlib.contextmanager
def _clean_environment(profile: Profile) -> Iterator[None]:
    """What the profile says holds: sbatch would take SBATCH_ variables before the script's own lines.

    Those for what a profile leaves out stay. A job that is submitted from within another does not inherit its sizes. (submitit's
    own clean_env would also take SLURM_CONF away.)
    """
    left_out = {f"SBATCH_{key.upper()}" for key in LEFT_OUT if getattr(profile, key) is None}
    kept = {*left_out, "SBATCH_RESERVATION", "SLURM_CONF"}
    inside = "SLURM_JOB_ID" in os.environ
    names = [n for n in os.environ if n.startswith("SBATCH_") or (inside and n.startswith("SLURM_"))]
    hidden = {name: os.environ.pop(name) for name in names if name not in kept}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end: a job that sbatch has taken is one that `status` and `cancel` know.

    sbatch, whom Ctrl-C at a terminal reaches too, inherits that the signals are blocked. Here they are noted besides, as
    they may come to another thread.
    """
    heard: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    handlers = {kind: signal.signal(kind, lambda number, _: heard.append(number)) for kind in kinds}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for kind, handler in handlers.items():
            signal.signal(kind, handler or signal.SIG_DFL)
        if heard:
            signal.raise_signal(heard[0])


@contextlib.contextmanager
def _own_sessions() -> Iterator[None]:
    """Children started within have a session of their own: Ctrl-C at the terminal reaches this process alone.

    It then tells the ranks, once. submitit has no option for it, and its controller would end them after a second.
    """
    popen = subprocess.Popen
    subprocess.Popen = functools.partial(popen, start_new_session=True)  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        subprocess.Popen = popen  # type: ignore[misc]


@contextlib.contextmanager
def _standard_error_into(path: Path) -> Iterator[None]:
    """Children started within write their standard error to the end of `path`."""
    kept = os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.dup2(file, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(file)
