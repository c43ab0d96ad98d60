"""The command report."""

from __future__ import annotations

import shlex

from dsno_cluster.commands.arguments import Arguments


def write_report(arguments: Arguments) -> None:
    from dsno_cluster.cluster.runs import config_file_of_run, config_of_run
    from dsno_cluster.report import page

    word = arguments.run_word()
    config = config_of_run(word, arguments.overrides)
    config_words = shlex.join([config_file_of_run(word), *arguments.overrides])
    print(f"report: {page.write_report(config, config_words, arguments.options.out)}")
