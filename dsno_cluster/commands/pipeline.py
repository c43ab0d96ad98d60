"""The commands that run all stages: run, demo."""

from __future__ import annotations

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.commands.evaluation import show_metrics, written_metrics
from dsno_cluster.commands.launching import choose, follow_to_end, make_submission, ranks_of, show_scripts
from dsno_cluster.files import shown_path


def run_pipeline(arguments: Arguments) -> None:
    from dsno_cluster.stages import check_ahead, describe_path, parts_of, run_path

    config, options = arguments.config(), arguments.options
    parts = parts_of(config)
    first = parts[0].stage
    # what is missing is reported before anything starts or is submitted
    checked = None if options.dry_run else first.check(config, first.options(), 1)
    launcher = choose(arguments, first)
    submissions = [
        make_submission(arguments, launcher, part.stage, part.config, part.stage.options()) for part in parts
    ]
    ranks = [ranks_of(submission) for submission in submissions]
    if options.dry_run:
        described = show_scripts(arguments, launcher, submissions)
        first.check(config, first.options(), 1)
        if not described:
            print(f"would make {describe_path(config)}")
        for submission in submissions:
            launcher.check(submission)
        check_ahead(parts, ranks)
        return
    check_ahead(parts, ranks)
    if not any(launcher.takes(submission) for submission in submissions):
        show_metrics(run_path(config, checked).details)
        return
    runs = launcher.submit(submissions)
    if options.wait:
        follow_to_end(launcher, runs)
        show_metrics(written_metrics(parts[-1].config))


def run_demo(arguments: Arguments) -> None:
    from dsno_cluster.stages import check_ahead, describe_path, parts_of, run_path

    config = arguments.config()
    parts = parts_of(config)
    first, last = parts[0], parts[-1]
    checked = first.stage.check(config, first.stage.options(), 1)
    if arguments.options.dry_run:
        print(f"would make {describe_path(config)}")
        return
    check_ahead(parts, [1] * len(parts))
    show_metrics(run_path(config, checked).details)
    print(f"\nlook at {shown_path(config.storage.root)}/evaluation/{last.config.name}/samples.png")
