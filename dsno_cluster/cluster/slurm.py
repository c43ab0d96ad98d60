"""Submitting stages through submitit: to Slurm, or to several processes on this machine.

The same executor interface serves both. What is pickled is a `StageTask`, which holds the stage's name and the
config as text, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsno_cluster import console
from dsno_cluster.config import Config, Profile, dump_config, with_absolute_paths
from dsno_cluster.errors import LOST_RANK, UserError, WorkError

CONTROLLER_SECONDS = 2.0
MOST_REQUEUES = 1000
_REASONS = {"UserError: ": UserError, "WorkError: ": WorkError}


def choose_launcher(asked: str, nodes: int) -> str:
    """`local` or `slurm`. auto is Slurm where sbatch is on PATH and the controller answers within 2 s.

    Raises UserError for slurm without sbatch and for several nodes on this machine alone, and WorkError for
    slurm whose controller does not answer.
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
        why = silence
        console.say(f"running on this machine: {silence}")
    if nodes > 1:
        raise UserError(
            f"--nodes {nodes}: the local launcher ({why}) has one node; several need --launcher slurm"
        )
    return "local"


def controller_silence() -> str | None:
    """Why Slurm's controller cannot be used, or None where it answers."""
    try:
        ping = subprocess.run(
            ["scontrol", "ping"], capture_output=True, text=True, timeout=CONTROLLER_SECONDS
        )
    except FileNotFoundError:
        return "there is no scontrol on PATH"
    except subprocess.TimeoutExpired:
        return f"Slurm's controller did not answer within {CONTROLLER_SECONDS:g} s"
    return None if ping.returncode == 0 and " UP" in ping.stdout else "Slurm's controller is down"


@dataclass(frozen=True)
class StageTask:
    """What one task of a job does; picklable, text only. `actors` is for the Ray stages, `student` for eval."""

    stage: str
    config_yaml: str
    actors: int | None = None
    student: str | None = None

    def __call__(self) -> str:
        try:
            return self._run()
        except (UserError, WorkError) as error:
            # leaves no traceback, ends the other ranks, and is found in the log by `follow`
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            sys.exit(2 if isinstance(error, UserError) else 1)
        except KeyboardInterrupt:
            sys.exit(130)

    def checkpoint(self) -> Any:
        """What submitit submits again when the job is requeued: the same task, which goes on from its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _run(self) -> str:
        import yaml

        from dsno_cluster.config import validate

        config = validate(Config, yaml.safe_load(self.config_yaml), "the submitted config")
        if self.stage == "train":
            from submitit.helpers import TorchDistributedEnvironment

            from dsno_cluster.training.loop import train

            # DeepSpeed picks cuda:LOCAL_RANK itself, so every device must stay visible to every rank
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            return train(config)
        if self.stage == "gen-trajectories":
            from dsno_cluster.trajectories.generate import generate

            return generate(config, self.actors)
        from dsno_cluster.evaluation.evaluate import evaluate

        evaluate(config, self.student, self.actors)
        return f"{config.storage.root}/evaluation/{config.name}"


def submit(task: StageTask, config: Config, profile: Profile, cluster: str) -> Any:
    """Submit a stage to `slurm` or `local`; returns submitit's job."""
    executor = _executor(config, profile, task.stage, cluster)
    if cluster == "slurm":
        return executor.submit(task)
    # submitit's controller of local jobs inherits standard error, and ends with a traceback when it is cancelled
    with _standard_error_into(logs_dir(config, task.stage) / "controller.log"), _own_sessions():
        return executor.submit(task)


def sbatch_script(stage: str, config: Config, profile: Profile) -> str:
    """The script that `submit` would hand to sbatch, for --dry-run."""
    executor = _executor(config, profile, stage, "slurm")._executor
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def follow(job: Any, *, poll_seconds: float = 0.5) -> str:
    """Show what rank 0 of a local job prints until it ends; returns the task's result.

    Ctrl-C cancels the job. Raises WorkError with the last words of the rank that failed.
    """
    first = (
        Path(str(job.paths.stderr).replace("%t", "0")) if "%t" in str(job.paths.stderr) else job.paths.stderr
    )
    shown = 0
    try:
        while True:
            ended = job.done()
            text = first.read_text() if first.is_file() else ""
            complete = text.rfind("\n") + 1
            for line in text[shown:complete].splitlines():
                if not line.startswith(("submitit ", *_REASONS)):
                    console.say(line)
            shown = max(shown, complete)
            if ended:
                break
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        _interrupt(job, poll_seconds)
        raise
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return str(job.results()[0])
    except (FailedJobError, UncompletedJobError) as error:
        reasons = _reasons(job)
        if reasons:
            raise reasons[0] from error
        raise WorkError(f"job {job.job_id} failed; its logs are in {job.paths.folder}") from error


def _reasons(job: Any) -> list[Exception]:
    """Why ranks ended, from their logs: first those that did not merely miss another one."""
    found = []
    for log in sorted(job.paths.folder.glob(f"{job.job_id}_*_log.err")):
        for line in log.read_text().splitlines():
            for kind, raised in _REASONS.items():
                if line.startswith(kind):
                    found.append(raised(line.removeprefix(kind)))
    return sorted(found, key=lambda reason: str(reason).startswith(LOST_RANK))


def _interrupt(job: Any, poll_seconds: float) -> None:
    """End a local job: its ranks save and leave; a second Ctrl-C ends them at once."""
    import psutil

    console.say("interrupted: the ranks save at their next step; Ctrl-C again ends them at once")
    try:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(int(job.job_id)).children():
                child.send_signal(signal.SIGINT)
        while not job.done():
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        job.cancel()
        for _ in range(int(10 / poll_seconds)):  # the ranks have a second to end by themselves
            if job.done():
                break
            time.sleep(poll_seconds)
        raise


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


def config_task(
    stage: str, config: Config, actors: int | None = None, student: str | None = None
) -> StageTask:
    """The task of a stage, with the config's folders made absolute."""
    return StageTask(stage, dump_config(with_absolute_paths(config)), actors, student)


def logs_dir(config: Config, stage: str) -> Path:
    return config.run_dir / "logs" / config.name / stage


def _executor(config: Config, profile: Profile, stage: str, cluster: str) -> Any:
    import submitit
    import torch

    folder = logs_dir(config, stage)
    if cluster == "local":
        # the profile is a cluster's; here are one node, every GPU, and no time limit but a month
        gpus = torch.cuda.device_count()
        profile = profile.model_copy(update={"nodes": 1, "gpus_per_node": gpus, "time_minutes": 30 * 24 * 60})
        # submitit's ranks find each other on this machine at a port that is free now
        from dsno_cluster.training.engine import free_port

        os.environ["MASTER_PORT"] = str(free_port())
    # submitit takes any signal to a job of under ten minutes for a time-out: its budget of them is no limit here
    budget = {f"{cluster}_max_num_timeout": MOST_REQUEUES}
    executor = submitit.AutoExecutor(folder=folder.absolute(), cluster=cluster, **budget)
    parameters: dict[str, Any] = {
        "name": f"{stage}-{config.name}",
        "nodes": profile.nodes,
        "tasks_per_node": profile.tasks_per_node,
        "gpus_per_node": profile.gpus_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "mem_gb": profile.mem_gb,
        "timeout_min": profile.time_minutes,
    }
    if cluster == "slurm":
        optional = {
            "slurm_partition": profile.partition,
            "slurm_account": profile.account,
            "slurm_qos": profile.qos,
            "slurm_setup": list(profile.setup) or None,
            "slurm_srun_args": ["--kill-on-bad-exit=1"],  # a lost rank is no reason for others to wait
            "slurm_additional_parameters": dict(profile.sbatch) or None,
        }
        parameters |= {key: value for key, value in optional.items() if value is not None}
        if not profile.gpus_per_node:
            del parameters["gpus_per_node"]  # a cluster without GPUs refuses even a request for none
    executor.update_parameters(**parameters)
    return executor
