"""The commands that run all stages: run, demo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.commands.evaluation import show_metrics, written_metrics
from dsno_cluster.commands.launching import (
    follow_to_end,
    launcher_and_profile,
    print_scripts,
    profile_of,
    say_submitted,
    scripts_anyway,
)
from dsno_cluster.files import shown_path

if TYPE_CHECKING:
    from dsno_cluster.config import Config


def run_pipeline(arguments: Arguments) -> None:
    from dsno_cluster.pipeline import describe, run_here, stages_of
    from dsno_cluster.training.ranks import check_divides
    from dsno_cluster.trajectories.plan import make_plan

    config, options = arguments.config(), arguments.options
    stages = stages_of(config)
    with scripts_anyway(arguments, config, stages):
        plan = make_plan(config)  # what is missing is said before anything starts or is submitted
    launcher, _ = launcher_and_profile(arguments, stages[0])
    if launcher == "local":
        if options.dry_run:
            print(f"would make {describe(config)}")
            return
        _check_all_stages(config, plan.folder)
        show_metrics(run_here(config))
        return
    profiles = {stage: profile_of(arguments, stage, on_slurm=True) for stage in stages}
    check_divides(config, profiles["train"].nodes * profiles["train"].tasks_per_node)
    from dsno_cluster.cluster.submit import submit_pipeline

    if options.dry_run:
        print_scripts(arguments, config, profiles)
        return
    _check_all_stages(config, plan.folder)
    runs = submit_pipeline(config, profiles, arguments.command_line)
    for run in runs:
        say_submitted(run)
    if options.wait:
        follow_to_end(runs)
        show_metrics(written_metrics(config))


def _check_all_stages(config: Config, folder: str) -> None:
    """Raises UserError or WorkError for what a later stage would miss, hours from now."""
    from dsno_cluster.evaluation.look_up import check_comparison
    from dsno_cluster.training.objectives.losses import find_lpips_weights
    from dsno_cluster.trajectories.plan import check_reachable

    check_reachable(config, folder)
    find_lpips_weights(config.training)
    check_comparison(config)


def run_demo(arguments: Arguments) -> None:
    from dsno_cluster.pipeline import describe, run_here
    from dsno_cluster.trajectories.plan import make_plan

    config = arguments.config()
    make_plan(config)
    if arguments.options.dry_run:
        print(f"would make {describe(config)}")
        return
    show_metrics(run_here(config))
    print(f"\nlook at {shown_path(config.storage.root)}/evaluation/{config.name}/samples.png")
