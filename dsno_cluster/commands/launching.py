"""Running and submitting stages, for all commands that do so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsno_cluster.commands.arguments import Arguments, Unwatched
from dsno_cluster.errors import UserError
from dsno_cluster.files import shown_path

if TYPE_CHECKING:
    from dsno_cluster.cluster.launchers import Launcher
    from dsno_cluster.cluster.runs import Run
    from dsno_cluster.cluster.stage import Options, Stage, StageOptions, StageResult, Submission
    from dsno_cluster.config import Config


def run_stage(
    arguments: Arguments, stage: Stage[Options], config: Config, options: Options
) -> StageResult | None:
    """Run a stage with the launcher that the command line asks for; None if its result is not known.

    A launcher that does not wait for a run returns at once; --wait follows it to its end. --dry-run prints what would run.
    Whatever is missing is reported before anything starts or is submitted.
    """
    asked = arguments.options
    if asked.dry_run:
        launcher = choose(arguments, stage)
        submission = make_submission(arguments, launcher, stage, config, options)
        described = show_scripts(arguments, launcher, [submission])
        would = stage.check(config, options, ranks_of(submission)).would
        if not described:
            print(json.dumps({"dry_run": would}) if _as_json(arguments) else would)
        launcher.check(submission)
        return None
    checked = stage.check(config, options, _tasks_asked(arguments) or 1)
    launcher = choose(arguments, stage)
    submission = make_submission(arguments, launcher, stage, config, options)
    if not launcher.takes(submission):
        launcher.check(submission)
        return stage.run(config, options, getattr(asked, "ray_address", None), checked.found)
    stage.check_ahead(config, ranks_of(submission))
    (run,) = launcher.submit([submission])
    if launcher.detached and _as_json(arguments):
        print(json.dumps({"run": run.id, "job": run.record().job, "folder": str(run.folder)}))
    return follow_to_end(launcher, [run]) if asked.wait or not launcher.detached else None


def choose(arguments: Arguments, stage: Stage[Any]) -> Launcher:
    """The launcher for a stage. Raises UserError for contradictory options."""
    from dsno_cluster import console
    from dsno_cluster.cluster.launchers import LOCAL, SLURM, choose_launcher
    from dsno_cluster.cluster.ray_pool import given_address
    from dsno_cluster.config import load_profile

    options = arguments.options
    asked = options.launcher
    address = given_address(options.ray_address) if hasattr(options, "ray_address") else None
    if address is not None:  # its actors are driven from here: a Slurm job would start its own Ray
        if asked == SLURM.name:
            raise UserError(
                f"--launcher slurm: a Ray cluster is given, {address}; leave out --ray-address and unset RAY_ADDRESS, or take "
                "--launcher local to use it"
            )
        if asked == "auto":
            console.say(f"using the Ray cluster {address} from this machine")
        asked = LOCAL.name
    return choose_launcher(
        asked, options.nodes or 1, load_profile(stage.name, {"nodes": options.nodes}).nodes
    )


def make_submission(
    arguments: Arguments, launcher: Launcher, stage: Stage[Any], config: Config, options: StageOptions
) -> Submission:
    """The submission of a stage with its profile.

    Raises UserError for a profile that does not suit the stage.
    """
    from dsno_cluster.cluster.stage import RayOptions, Submission

    nodes = 1 if getattr(options, "array", 1) > 1 else arguments.options.nodes
    profile = launcher.profile(stage, nodes, _tasks_asked(arguments))
    if isinstance(options, RayOptions):
        if options.gpus_per_actor is None:
            options = replace(options, gpus_per_actor=profile.gpus_per_actor)
        else:
            profile = profile.model_copy(update={"gpus_per_actor": options.gpus_per_actor})
    return Submission(stage, config, profile, arguments.command_line, options)


def show_scripts(arguments: Arguments, launcher: Launcher, submissions: Sequence[Submission]) -> bool:
    """Print the script that the launcher would submit for each stage; returns whether there is any."""
    names = _names(submissions)
    texts = {
        name: text
        for name, submission in zip(names, submissions, strict=True)
        if (text := launcher.describe(submission)) is not None
    }
    if _as_json(arguments) and texts:
        print(json.dumps({"dry_run": texts}), flush=True)
    else:
        for name, text in texts.items():
            print(f"# {name}\n{text}" if len(texts) > 1 else text, flush=True)
    return bool(texts)


def _names(submissions: Sequence[Submission]) -> list[str]:
    """The submissions' stages; with the experiment's name for those of a second experiment."""
    first = submissions[0].config.name
    return [
        s.stage.name if s.config.name == first else f"{s.stage.name} {s.config.name}" for s in submissions
    ]


def follow_to_end(launcher: Launcher, runs: Sequence[Run]) -> StageResult:
    """Wait for submitted runs, one after the other; returns the result of the last.

    Ctrl-C raises Unwatched if their jobs continue without this command.
    """
    from dsno_cluster import console
    from dsno_cluster.cluster.stage import StageResult

    for run in runs:
        try:
            address = launcher.follow(run)
        except KeyboardInterrupt:
            if launcher.detached:
                raise Unwatched(run.word) from None
            raise
        if launcher.detached:  # a local run prints this itself
            console.say(f"done: {shown_path(address)}")
    return StageResult(address)


def _tasks_asked(arguments: Arguments) -> int | None:
    tasks: int | None = getattr(arguments.options, "tasks_per_node", None)
    return tasks


def ranks_of(submission: Submission) -> int:
    """The number of its processes."""
    return submission.profile.nodes * submission.profile.tasks_per_node


def _as_json(arguments: Arguments) -> bool:
    return bool(getattr(arguments.options, "json", False))
