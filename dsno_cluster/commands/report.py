"""The command report."""

from __future__ import annotations

import shlex

from dsno_cluster.commands.arguments import DEFAULT_CONFIG, Arguments
from dsno_cluster.errors import UserError


def write_report(arguments: Arguments) -> None:
    if len(arguments.words) > 1:
        raise UserError(
            f"one RUN at a time, found {' '.join(arguments.words)}; an override is written key=value"
        )
    from dsno_cluster.cluster.runs import config_file_of_run, config_of_run
    from dsno_cluster.evaluation import report

    word = arguments.words[0] if arguments.words else DEFAULT_CONFIG
    config = config_of_run(word, arguments.overrides)
    config_words = shlex.join([config_file_of_run(word), *arguments.overrides])
    print(f"report: {report.write_report(config, config_words, arguments.options.out)}")
