"""Slurm: a stage becomes a batch script that submitit passes to sbatch.

Slurm's own commands report its state.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsno_cluster import console
from dsno_cluster.cluster.crew import actors_on_gpus
from dsno_cluster.cluster.launchers.containers import make_mounted_folders
from dsno_cluster.cluster.launchers.following import wait_for
from dsno_cluster.cluster.launchers.protocol import LIVE, State, final_state, state_of_array
from dsno_cluster.cluster.reasons import how_it_ended
from dsno_cluster.cluster.records import Result, RunRecord, Stopped
from dsno_cluster.cluster.runs import BATCH_LOG, Run, all_runs, create_run, jobs_folder, unlink
from dsno_cluster.cluster.slurm_commands import (
    UNACCOUNTED,
    JobState,
    cancel_jobs,
    check_profile,
    cluster_name,
    host_names,
    job_states,
    refusal,
    user_name,
)
from dsno_cluster.cluster.stage import SharedOptions
from dsno_cluster.cluster.task import PLACE_IN_CHAIN, StageTask
from dsno_cluster.config import Config, Profile, load_profile
from dsno_cluster.errors import UserError, WorkError

if TYPE_CHECKING:
    import submitit

    from dsno_cluster.cluster.stage import Stage, Submission

SETTLE_SECONDS = 15.0
# keys of a profile for which sbatch has defaults of the user's
LEFT_OUT = ("partition", "account", "qos", "constraint")

WORDS = {
    "PENDING": "waiting",
    "REQUEUED": "waiting",
    "REQUEUE_HOLD": "waiting",
    "SPECIAL_EXIT": "waiting",
    "CONFIGURING": "starting",
    "RUNNING": "running",
    "COMPLETING": "ending",
    "SIGNALING": "running",
    "STAGE_OUT": "ending",
    "STOPPED": "suspended",
    "SUSPENDED": "suspended",
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
    "BOOT_FAIL": "failed",
    "NODE_FAIL": "failed",
    "TIMEOUT": "failed",
    "DEADLINE": "failed",
    "OUT_OF_MEMORY": "failed",
    "PREEMPTED": "failed",
    UNACCOUNTED: "ended",
}
WAITS = {
    "Priority": "others are before it",
    "Resources": "for free nodes",
    "Dependency": "for the stage before it",
    "DependencyNeverSatisfied": "for a stage that failed: it will never start",
    "BeginTime": "for its time to start",
    "ReqNodeNotAvail": "for nodes that are down, drained or reserved",
    "JobHeldUser": "held by its owner, until `scontrol release {job}`",
    "JobHeldAdmin": "held by an administrator, who can let it start with `scontrol release {job}`",
    "JobHoldMaxRequeue": "held because it was requeued too often; `scontrol release {job}` lets it start",
    "job requeued in held state": "requeued and held; `scontrol release {job}` lets it start",
    "launch failed requeued held": (
        "held because Slurm could not launch it; when the cause is mended, `scontrol release {job}` lets it start"
    ),
    "PartitionTimeLimit": "its time limit is above the partition's",
    "QOSMaxJobsPerUserLimit": "for another job of yours to end",
    "AssocGrpGRES": "for the account's share of GPUs",
}
NEXT = "for the job before it in its chain"
ENDS = {
    "NODE_FAIL": "a node was lost",
    "TIMEOUT": "its time limit was reached",
    "OUT_OF_MEMORY": "it needed more memory than mem_gb",
    "PREEMPTED": "another job needed its nodes",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "its deadline was reached",
    UNACCOUNTED: "how is not known: Slurm's accounting does not answer",
}


class SlurmLauncher:
    """Runs as jobs of Slurm."""

    name = "slurm"
    detached = True

    def profile(self, stage: Stage[Any], nodes: int | None, tasks_per_node: int | None) -> Profile:
        profile = load_profile(stage.name, {"nodes": nodes, "tasks_per_node": tasks_per_node})
        check_tasks(stage, profile)
        return profile

    def takes(self, submission: Submission) -> bool:
        return True

    def describe(self, submission: Submission) -> str:
        """The script for sbatch; RUN stands for the run folder, which does not exist yet.

        A chain is described by the script of its first job, and by how that of the second differs.
        """
        from dsno_cluster.cluster.launchers.batch_script import executor_for
        from dsno_cluster.cluster.submitit_internals import script_text

        chain, folder = submission.profile.chain, jobs_folder(submission.config) / "RUN"
        first = script_text(executor_for(submission, folder), submission.array)
        if chain == 1:
            return first
        second = script_text(executor_for(submission, folder, earlier=["FIRST"]))
        known = first.splitlines()
        new = "".join(f"\n#   {line}" for line in second.splitlines() if line not in known)
        return (
            f"{first}\n\n# chain {chain}: {chain - 1} more job(s), each of which begins if all before it ended without success; "
            f"the script of the second, after the job FIRST, differs by{new}"
        )

    def check(self, submission: Submission) -> None:
        check_room(submission.stage, submission.config, submission.profile)
        if submission.array > 1 and submission.profile.chain > 1:
            raise UserError(
                f"--array {submission.array}: not with chain {submission.profile.chain} of {_profile_file(submission.stage)}; "
                "the tasks of an array make up for each other"
            )
        check_image(submission.stage, submission.profile)
        check_profile(submission.profile, _profile_file(submission.stage))

    def submit(self, submissions: Sequence[Submission]) -> list[Run]:
        for submission in submissions:
            self.check(submission)
            self._refuse_second(submission)
        runs: list[Run] = []
        try:
            with _undisturbed():
                for submission in submissions:
                    runs.append(_submit(submission, runs[-1] if runs else None))
        except BaseException:  # including Ctrl-C
            for run in runs:
                _take_back(run)
            raise
        for run in runs:
            record = run.record()
            more = f" and {len(record.successors)} that continue it" if record.successors else ""
            more = f", an array of {record.array} tasks" if record.array else more
            console.say(
                f"submitted {record.stage} of {record.name} as Slurm job {record.job}{more}: `dsno-cluster status {run.word}`, "
                f"`dsno-cluster logs {run.word} --follow`; files: {run.folder}"
            )
        return runs

    def _refuse_second(self, submission: Submission) -> None:
        """Raises WorkError if the same stage of the same experiment waits or runs already, on the same subject."""
        config, stage = submission.config, submission.stage.name
        wanted = (self.name, stage, config.name, config.storage.root, submission.options.subject)
        same = [
            run
            for run in all_runs(config)
            if (r := run.record()).job and (r.launcher, r.stage, r.name, r.root, r.subject) == wanted
        ]
        ended = {run: state for run in same if (state := final_state(run)) is not None}
        for run, state in self.states([run for run in same if run not in ended]).items():
            if state.live:
                known = state.word != "state unknown"
                found = f"is {state.word} already" if known else f"may run already ({state.why})"
                raise WorkError(
                    f"{stage} of {config.name} {found}, as job {run.job}: "
                    f"follow it with `dsno-cluster logs {run.word} --follow`, or end it with `dsno-cluster cancel {run.word}`"
                )

    def states(self, runs: Sequence[Run]) -> dict[Run, State]:
        by_owner: dict[str, list[str]] = {}
        for run in runs:
            by_owner.setdefault(run.owner, []).extend(run.record().jobs)
        jobs: dict[str, JobState] | None
        try:
            jobs = {
                job: state for owner, ids in by_owner.items() for job, state in job_states(ids, owner).items()
            }
        except (UserError, WorkError) as error:
            console.say(f"Slurm does not report the states of jobs now: {error}")
            jobs = None
        return {run: _state_of_run(run, jobs) for run in runs}

    def follow(self, run: Run) -> str:
        def ask() -> State:
            return final_state(run) or self.states([run])[run]

        return wait_for(run, ask)

    def logs(self, run: Run, rank: int, attempt: int | None) -> Path | None:
        """The task's log; for rank 0 the batch script's log until the task has its own."""
        file = run.attempt(attempt).log(rank) if attempt is not None else None
        if file is not None and file.is_file():
            return file
        batch, begun = run.folder / BATCH_LOG, file is None or file.parent.is_dir()
        return batch if rank == 0 and begun and batch.is_file() else None

    def cancel(self, run: Run) -> None:
        cancel_jobs(_whole_jobs(run))


def check_tasks(stage: Stage[Any], profile: Profile) -> None:
    """Raises UserError for a number of tasks that does not suit the kind of the stage."""
    tasks, gpus = profile.tasks_per_node, profile.gpus_per_node
    if stage.kind == "ray" and tasks != 1:
        raise UserError(
            f"{_profile_file(stage)}: tasks_per_node {tasks}: {stage.name} takes 1; its Ray actors fill the node"
        )
    if stage.kind == "ranks" and gpus and tasks != gpus:
        raise UserError(
            f"{_profile_file(stage)}: tasks_per_node {tasks} with gpus_per_node {gpus}: training runs one task per GPU, so give "
            "both the same number"
        )


def check_room(stage: Stage[Any], config: Config, profile: Profile) -> None:
    """Raises UserError if a node has too few CPUs for an actor of a Ray stage, or for the actors of its GPUs."""
    if stage.kind != "ray":
        return
    threads: int = getattr(config, stage.section).threads
    wanted = max(1, actors_on_gpus(profile.gpus_per_node, profile.gpus_per_actor))
    if profile.cpus_per_task < threads * wanted:
        each = profile.gpus_per_actor
        taken = "an actor each" if each == 1 else f"{wanted} actors (gpus_per_actor {each:g})"
        what = f"its {profile.gpus_per_node} GPUs have {taken}" if wanted > 1 else "it has one actor at least"
        raise UserError(
            f"{_profile_file(stage)}: cpus_per_task {profile.cpus_per_task} of a node: {what}, of "
            f"{stage.section}.threads={threads} CPUs; raise cpus_per_task to {threads * wanted}"
        )


def check_image(stage: Stage[Any], profile: Profile) -> None:
    """Raises UserError if the image of the tasks' container is a file that does not exist."""
    container = profile.container
    if container is not None and os.path.isabs(container.image) and not os.path.exists(container.image):
        raise UserError(f"{_profile_file(stage)}: container.image: {container.image}: no such file or folder")


def _whole_jobs(run: Run) -> Sequence[str]:
    """The jobs to cancel: those of a chain, or an array by its own number, as some of its tasks may have ended."""
    record = run.record()
    return record.jobs if record.array is None else [str(record.job)]


def _profile_file(stage: Stage[Any]) -> str:
    return f"jobs/{stage.name}.yaml"


def _state_of_run(run: Run, jobs: dict[str, JobState] | None) -> State:
    """The state of a run's job or array; `jobs` None: Slurm does not answer."""
    if not run.tasks:
        return _state(run, jobs)
    return state_of_array([final_state(task) or _state(task, jobs) for task in run.tasks])


def _state(run: Run, jobs: dict[str, JobState] | None) -> State:
    """The state of a run's job; `jobs` None: Slurm does not answer."""
    record = run.record()
    if jobs is None:
        return State("state unknown", "Slurm does not answer")
    if record.cluster not in (None, cluster_name()):
        return State("state unknown", f"it is on the cluster {record.cluster}, this is {cluster_name()}")
    # the first job of a chain that has not ended, or the run's only job
    alive = (id for id in record.jobs if id in jobs and WORDS.get(jobs[id].state, "state unknown") in LIVE)
    number = next(alive, str(run.job))
    job = jobs.get(number)
    if (job is None or job.state == UNACCOUNTED) and run.owner != user_name(os.getuid()):
        return State("state unknown", f"Slurm does not show {run.owner}'s jobs to {user_name(os.getuid())}")
    if job is None:
        return _ended(run, "failed", f"Slurm no longer knows the job; {_how(run)}")
    word = WORDS.get(job.state, "state unknown")
    if word == "state unknown":
        return State(word, job.state)
    if word == "waiting":
        first = number == record.job
        return State(word, _wait(job.reason, number) if first or job.reason != "Dependency" else NEXT)
    if word == "running" and run.is_ray_stage and _lost_first_node(job):
        said = f"its first node, {job.batch_host}, is lost, and its work stands still"
        return State("stalled", f"{said}; {_restart(record, number)}", job.nodes)
    if word in LIVE:
        return State(word, "", job.nodes)
    if word == "failed" and job.seconds_over() < SETTLE_SECONDS:
        return State("ending")  # for a moment Slurm reports this for a job that it is about to requeue
    return _ended(run, word, ENDS.get(job.state) or ("" if word in ("done", "cancelled") else _how(run)))


def _restart(record: RunRecord, job: str) -> str:
    """What lets the work of a job continue that stands still."""
    if record.successors and job == record.jobs[-1]:
        return f"it is the last of its chain: `scancel {job}`, then the same command resumes"
    if record.successors:
        return f"`scancel {job}` lets the next job of its chain continue"
    return f"`scontrol requeue {job}` starts it again"


def _wait(reason: str, job: str) -> str:
    """What a job waits for; in Slurm's own words if there are no plainer ones."""
    first, _, more = reason.partition(",")
    if first not in WAITS:
        return "" if reason == "None" else reason
    return WAITS[first].format(job=job) + more.replace("_", " ")


def _ended(run: Run, word: str, reason: str) -> State:
    """The state of a run whose job has ended and whose batch script left no final state.

    What the run folder knows for certain counts more than Slurm's state: that the work was finished, or that
    the run was cancelled.
    """
    attempts = run.attempts()
    if attempts and attempts[-1].read(Result) is not None:
        return State("done")
    stopped = attempts[-1].read(Stopped) if attempts else None
    if run.cancelled or (stopped is not None and stopped.why == "cancelled"):
        return State("cancelled")
    if word == "cancelled" and run.record().after and not attempts:
        return State(word, "the stage that it waited for did not succeed")
    return State(word, reason)


def _how(run: Run) -> str:
    attempts = run.attempts()
    if attempts:
        return how_it_ended(attempts[-1])
    log = run.folder / BATCH_LOG
    return f"its batch script ended before the work began; see {log}" if log.is_file() else "it never began"


def _lost_first_node(job: JobState) -> bool:
    """Whether a running job no longer has the node of its batch script."""
    return job.batch_host != job.nodes and job.batch_host not in host_names(job.nodes)


def _submit(submission: Submission, after: Run | None) -> Run:
    """Submit a stage, to begin when the run `after` is done. Raises UserError for a job that Slurm will never take."""
    from submitit.core.utils import FailedJobError

    from dsno_cluster.cluster.launchers.batch_script import executor_for
    from dsno_cluster.cluster.submitit_internals import script_text

    cluster = cluster_name()
    run = create_run(submission, snapshot=True)
    run.note(launcher=SlurmLauncher.name, cluster=cluster, after=str(after.folder) if after else None)
    jobs: list[str] = []
    try:
        make_mounted_folders(submission)
        while len(jobs) < submission.profile.chain:
            executor = executor_for(submission, run.folder, after.record().jobs if after else (), jobs)
            with _clean_environment(submission.profile):
                if not jobs:
                    (run.folder / "script.sh").write_text(script_text(executor, submission.array))
                with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints what it raises
                    jobs.append(_sbatch(executor, submission, run))
            run.note(job=jobs[0], successors=jobs[1:])
        for place, task in enumerate(run.tasks):
            task.note(job=f"{jobs[0]}_{place}", launcher=SlurmLauncher.name, cluster=cluster)
    except BaseException as error:
        if jobs:
            _take_back(run)
        else:
            _forget(run)
        if isinstance(error, FailedJobError):
            raise refusal(str(error)) from error
        raise
    return run


def _sbatch(executor: submitit.SlurmExecutor, submission: Submission, run: Run) -> str:
    """Submit a job or an array; returns its number."""
    stage, options = submission.stage, submission.options
    if not isinstance(options, SharedOptions) or options.array == 1:
        return str(executor.submit(StageTask(stage, options, str(run.folder))).job_id)
    with executor.batch():
        tasks = [
            executor.submit(StageTask(stage, replace(options, place=place), str(task.folder)))
            for place, task in enumerate(run.tasks)
        ]
    return str(tasks[0].job_id).partition("_")[0]


def _forget(run: Run) -> None:
    """Delete a run folder whose job was not submitted."""
    unlink(run)
    shutil.rmtree(run.folder, ignore_errors=True)


def _take_back(run: Run) -> None:
    """Cancel a job that was just submitted."""
    run.cancel()
    with contextlib.suppress(WorkError):
        cancel_jobs(_whole_jobs(run))


@contextlib.contextmanager
def _clean_environment(profile: Profile) -> Iterator[None]:
    """Hide SBATCH_ variables, which would take precedence over the script's own lines from the profile.

    Those for keys that the profile omits stay. A job that is submitted from within another does not inherit
    its sizes. (submitit's own clean_env would also remove SLURM_CONF.)
    """
    left_out = {f"SBATCH_{key.upper()}" for key in LEFT_OUT if getattr(profile, key) is None}
    kept = {*left_out, "SBATCH_RESERVATION", "SLURM_CONF"}
    inside = "SLURM_JOB_ID" in os.environ
    ours = ("SLURM_", PLACE_IN_CHAIN)
    names = [n for n in os.environ if n.startswith("SBATCH_") or (inside and n.startswith(ours))]
    hidden = {name: os.environ.pop(name) for name in names if name not in kept}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM, so that `status` and `cancel` know every job that sbatch has taken.

    sbatch, which Ctrl-C at a terminal also reaches, inherits the blocked signals. They are also noted here,
    because they may be delivered to another thread.
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
