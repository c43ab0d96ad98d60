"""The commands of submitted runs: status, logs, cancel."""

from __future__ import annotations

import json

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.errors import UserError


def show_status(arguments: Arguments) -> None:
    from dsno_cluster.cluster import status
    from dsno_cluster.cluster.runs import all_runs, find_run, index, runs_of_config
    from dsno_cluster.config import is_config_file
    from dsno_cluster.provenance import Code

    configs = [word for word in arguments.words if is_config_file(word)]
    if arguments.overrides and not configs:
        raise UserError(
            f"status takes runs, or a config with its overrides, not {arguments.overrides[0]} only"
        )
    options = arguments.options
    named = [find_run(word) for word in arguments.words if word not in configs]
    of_configs = [run for file in configs for run in runs_of_config(file, arguments.overrides)]
    runs = named + of_configs if arguments.words else all_runs()
    shown = runs if named or options.all else runs[: status.SHOWN]
    rows = status.overview(shown)
    if options.json:
        print(json.dumps({"runs": [row.model_dump(mode="json") for row in rows]}))
        return
    from dsno_cluster import console

    if not rows:
        print(
            f"no submitted runs in {index()}. `status` lists only Slurm jobs and local training runs with --tasks-per-node; "
            "other local commands print their progress in their own terminal"
        )
        return
    console.table("runs, newest first", *status.table_rows(rows), divided=False)
    if len(shown) < len(runs):
        print(f"{len(runs) - len(shown)} older ones: --all")
    for run, row in zip(shown, rows, strict=True) if named else ():
        code = row.code or Code(version="unknown")
        commit = f", commit {code.commit[:12]}{' with changes' if code.dirty else ''}" if code.commit else ""
        print(f"{row.run}: version {code.version}{commit}; files: {row.folder}")
        for line in status.history(run):
            print(line)


def show_logs(arguments: Arguments) -> None:
    from dsno_cluster.cluster.runs import all_runs, find_run
    from dsno_cluster.cluster.status import log_lines

    options = arguments.options
    if len(arguments.words) > 1 or arguments.overrides:
        raise UserError("name one RUN (`dsno-cluster status` lists them), or none for the newest")
    newest = all_runs()[:1]
    if not arguments.words and not newest:
        raise UserError("no run was submitted yet; a command on this machine prints its log itself")
    run = find_run(arguments.words[0]) if arguments.words else newest[0]
    for line in log_lines(run, options.rank, options.attempt, options.follow):
        print(line, flush=True)


def cancel_runs(arguments: Arguments) -> None:
    from dsno_cluster import console
    from dsno_cluster.cluster.status import cancel, run_to_cancel

    if not arguments.words or arguments.overrides:
        raise UserError("name the RUN to cancel (`dsno-cluster status` lists them)")
    for run in [run_to_cancel(word) for word in arguments.words]:
        console.say(f"{run.id}: {cancel(run)}")
