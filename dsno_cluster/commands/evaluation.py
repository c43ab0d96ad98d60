"""The command eval, and how metrics are shown in a terminal."""

from __future__ import annotations

import json
from typing import Any

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.commands.launching import launcher_and_profile, submit_stage


def evaluate_student(arguments: Arguments) -> None:
    config = arguments.config()
    from dsno_cluster.evaluation.evaluate import find_student

    path, _ = find_student(config, arguments.options.student)
    launcher, profile = launcher_and_profile(arguments, "eval")
    if launcher == "slurm":
        submit_stage(arguments, config, profile, "eval")
        return
    from dsno_cluster.cluster.ray_pool import actor_count

    actors = arguments.options.actors
    if arguments.options.dry_run:
        text = (
            f"would evaluate {path} with {config.evaluation.num_samples} samples, "
            f"metrics {', '.join(config.evaluation.metrics)}, {actor_count(actors, config.evaluation.threads)}"
        )
        print(json.dumps({"dry_run": text}) if arguments.options.json else text)
        return
    from dsno_cluster.evaluation.evaluate import evaluate

    metrics = evaluate(config, arguments.options.student, actors, arguments.options.ray_address)
    if arguments.options.json:
        print(json.dumps(metrics))
    else:
        show_metrics(metrics)


def show_metrics(metrics: dict[str, Any]) -> None:
    from dsno_cluster import console
    from dsno_cluster.evaluation.table import error_lines, table_rows

    header, rows = table_rows(metrics)
    count = metrics["num_samples"]
    console.table(f"{count} samples, {metrics['feature_extractor']['name']}", header, rows)
    lines = error_lines(metrics)
    if lines:
        print("relative error of the student's trajectory on held-out noise: " + ", ".join(lines))
