"""Where a stage runs: the launcher, its profile, and handing it to Slurm."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dsno_cluster.commands.arguments import Arguments, Unwatched
from dsno_cluster.errors import UserError, WorkError

if TYPE_CHECKING:
    from dsno_cluster.cluster.runs import Run
    from dsno_cluster.config import Config, Profile


def launcher_and_profile(arguments: Arguments, stage: str) -> tuple[str, Profile]:
    """Where a stage is to run, "local" or "slurm", and with which profile. Raises UserError for options that contradict."""
    from dsno_cluster import console
    from dsno_cluster.cluster.ray_pool import given_address
    from dsno_cluster.cluster.submit import choose_launcher

    options = arguments.options
    asked = options.launcher
    address = given_address(options.ray_address) if hasattr(options, "ray_address") else None
    if address is not None:  # its actors are driven from here: a job of Slurm would start a Ray of its own
        if asked == "slurm":
            raise UserError(
                f"--launcher slurm: a Ray cluster is given, {address}; leave out --ray-address and unset RAY_ADDRESS, or take "
                "--launcher local to use it"
            )
        if asked == "auto":
            console.say(f"using the Ray cluster {address} from this machine")
        asked = "local"
    profile = profile_of(arguments, stage, on_slurm=False)
    launcher = choose_launcher(asked, options.nodes or 1, profile.nodes)
    if launcher == "local" and options.wait:
        raise UserError("--wait: a stage on this machine is waited for anyway")
    return launcher, profile_of(arguments, stage, on_slurm=launcher == "slurm")


def profile_of(arguments: Arguments, stage: str, *, on_slurm: bool) -> Profile:
    """A stage's profile from jobs/, with the options of the command line over it."""
    from dsno_cluster.config import load_profile

    options = arguments.options
    tasks = getattr(options, "tasks_per_node", None) if stage == "train" else None
    return load_profile(stage, {"nodes": options.nodes, "tasks_per_node": tasks}, on_slurm=on_slurm)


@contextlib.contextmanager
def scripts_anyway(arguments: Arguments, config: Config, stages: Sequence[str]) -> Iterator[None]:
    """Within, input is looked for; where it is missing, --dry-run on Slurm still shows what sbatch would be given."""
    try:
        yield
    except (UserError, WorkError):
        # quietly: what is missing is the one thing to say
        with contextlib.suppress(UserError, WorkError), contextlib.redirect_stderr(io.StringIO()):
            if arguments.options.dry_run and launcher_and_profile(arguments, stages[0])[0] == "slurm":
                profiles = {stage: profile_of(arguments, stage, on_slurm=True) for stage in stages}
                print_scripts(arguments, config, profiles)
        raise


def print_scripts(arguments: Arguments, config: Config, profiles: dict[str, Profile]) -> None:
    """What sbatch would be given for each stage. Raises UserError, after that, for what the cluster could never run."""
    from dsno_cluster.cluster.slurm import check_profile
    from dsno_cluster.cluster.submit import sbatch_script

    scripts = {stage: sbatch_script(stage, config, profile) for stage, profile in profiles.items()}
    if getattr(arguments.options, "json", False):
        print(json.dumps({"dry_run": scripts}), flush=True)
    else:
        for stage, script in scripts.items():
            print(f"# {stage}\n{script}" if len(scripts) > 1 else script, flush=True)
    for stage, profile in profiles.items():
        check_profile(profile, f"jobs/{stage}.yaml")


def submit_stage(arguments: Arguments, config: Config, profile: Profile, stage: str) -> None:
    """Submit a stage to Slurm, or print its script for --dry-run; with --wait, follow it to its end."""
    from dsno_cluster.cluster.submit import stage_task, submit_to_slurm

    options = arguments.options
    if options.dry_run:
        print_scripts(arguments, config, {stage: profile})
        return
    chosen = {"gen-trajectories": ("actors",), "eval": ("actors", "student", "samples", "watch")}
    task = stage_task(stage, config, **{name: getattr(options, name) for name in chosen.get(stage, ())})
    run = submit_to_slurm(task, config, profile, arguments.command_line)
    say_submitted(run)
    if getattr(options, "json", False):
        print(json.dumps({"run": run.id, "job": run.record()["job"], "folder": str(run.folder)}))
    if options.wait:
        follow_to_end([run])


def say_submitted(run: Run) -> None:
    """Tell of a submitted run: its job, its folder and the commands that look at it."""
    from dsno_cluster import console

    record = run.record()
    console.say(
        f"submitted {record['stage']} of {record['name']} as Slurm job {record['job']}: `dsno-cluster status {run.id}`, "
        f"`dsno-cluster logs {run.id} --follow`; files: {run.folder}"
    )


def follow_to_end(runs: Sequence[Run]) -> None:
    """Wait for submitted runs, one after the other. Ctrl-C raises Unwatched: their jobs go on."""
    from dsno_cluster import console
    from dsno_cluster.cluster.status import wait_for

    for run in runs:
        try:
            console.say(f"done: {wait_for(run)}")
        except KeyboardInterrupt:
            raise Unwatched(run.id) from None
