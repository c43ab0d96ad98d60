"""The command report."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from dsno_cluster.commands.arguments import Arguments

if TYPE_CHECKING:
    from dsno_cluster.config import Config
    from dsno_cluster.report.progress import FollowedStage


def write_report(arguments: Arguments) -> None:
    from dsno_cluster.cluster.runs import config_file_of_run, config_of_run
    from dsno_cluster.report import following, page

    word = arguments.run_word()
    config = config_of_run(word, arguments.overrides)
    config_words = shlex.join([config_file_of_run(word), *arguments.overrides])
    out = arguments.options.out
    if arguments.options.follow:
        path = following.follow_report(config, config_words, _stages(config), out)
    else:
        path = page.write_report(config, config_words, out)
    print(f"report: {path}")


def _stages(config: Config) -> list[FollowedStage]:
    """The stages of the experiment's whole path."""
    from dsno_cluster.report.progress import FollowedStage
    from dsno_cluster.stages import parts_of

    return [FollowedStage(part.config, part.stage.name, part.purpose) for part in parts_of(config)]
