"""`report --follow`: the report of a run that is at work, written again whenever its files change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.report.page import report_path, write_page
from dsno_cluster.report.progress import FollowedStage, look
from dsno_cluster.report.run_files import read_curve, read_run_files, stored_versions

LOOK_SECONDS = 2.0


def follow_report(
    config: Config, config_words: str, stages: Sequence[FollowedStage], out: str | None = None
) -> str:
    """Write the report of a run whenever a file of it changes, until its last stage is done; returns its path.

    While it is followed, the page shows the progress of `stages` and loads its newer versions. The last version,
    which is also written if Ctrl-C ends this, does not. Raises as `write_report` does, but not if there is nothing
    to report yet.
    """
    path = report_path(config, out)
    progress = look(stages)
    stored, states = stored_versions(config), progress.states
    files = read_run_files(config)
    try:  # from before the first version on, which already loads newer ones
        write_page(path, files, config_words, progress)
        console.say(f"following {config.name}: {path} loads its newer versions; Ctrl-C ends this")
        while not progress.finished:
            time.sleep(LOOK_SECONDS)
            before = files, progress
            progress = look(stages, progress)
            # what is in the storage is read again only if something there may have changed: it may be large and far away
            if (found := (stored_versions(config), progress.states)) != (stored, states):
                (stored, states), files = found, read_run_files(config)
            else:
                files = replace(files, curve=read_curve(files.config))
            if (files, progress) != before:
                write_page(path, files, config_words, progress)
    finally:
        write_page(path, files, config_words, replace(progress, live=False))
    return path
