"""The progress of a run's stages, as a followed report shows it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dsno_cluster import console
from dsno_cluster.cluster.prometheus import StageProgress, read_progress
from dsno_cluster.config import Config
from dsno_cluster.report.markup import Markup, tag, together

RELOAD_SECONDS = 5  # between two versions of the page
QUIET_SECONDS = 300.0  # a stage is heard of at each shard, step or batch, which may take minutes


@dataclass(frozen=True)
class FollowedStage:
    """A stage of the run: the experiment that it belongs to, its name, and what it does."""

    config: Config
    name: str
    purpose: str

    def progress(self) -> StageProgress | None:
        return read_progress(self.config, self.name)


@dataclass(frozen=True)
class SeenStage:
    """A stage as it was `found`, and since when it has been found so, in seconds of this process's own clock.

    `quiet`: it should be at work, and has not been heard of for a while.
    """

    stage: FollowedStage
    found: StageProgress | None
    since: float
    quiet: bool


@dataclass(frozen=True)
class Progress:
    """The stages of a run with their progress. `live`: the page will have newer versions, which it loads itself."""

    stages: Sequence[SeenStage]
    live: bool

    @property
    def states(self) -> tuple[str | None, ...]:
        return tuple(seen.found.state if seen.found else None for seen in self.stages)

    @property
    def finished(self) -> bool:
        """Whether the last stage is done, and none was at work after it."""
        *before, last = [seen.found for seen in self.stages]
        if last is None or last.state != "done" or "running" in self.states:
            return False
        return all(found is None or found.order <= last.order for found in before)


def look(stages: Sequence[FollowedStage], before: Progress | None = None) -> Progress:
    """The progress of stages now. `before` is that of the last look, by which it is known what has changed since.

    Another host's clock may differ, so its times do not show how long ago something was.
    """
    now, seen = time.monotonic(), []
    for number, stage in enumerate(stages):
        found, last = stage.progress(), before.stages[number] if before is not None else None
        since = last.since if last is not None and last.found == found else now
        running = found is not None and found.state == "running"
        seen.append(SeenStage(stage, found, since, quiet=running and now - since > QUIET_SECONDS))
    return Progress(seen, live=True)


def progress_section(progress: Progress) -> Markup:
    command = tag("code", "dsno-cluster report --follow")
    how = (
        together(
            f"This page loads its newer version every {RELOAD_SECONDS} seconds, while ",
            command,
            " writes it.",
        )
        if progress.live
        else together("As it was when ", command, " ended.")
    )
    lines = map(_line, progress.stages)
    return together(tag("p", how, class_="muted"), tag("ol", *lines, class_="stages"))


def _line(seen: SeenStage) -> Markup:
    stage, found = seen.stage, seen.found
    state = found.state if found else "not begun"
    title = f"{stage.config.name}: {stage.name}"
    bar = None
    if found is not None and found.done is not None:
        bar = tag("progress", max=max(found.planned or 0, 1), value=found.done, aria_label=title)
    return tag(
        "li",
        tag("span", state, class_="state running" if state == "running" else "state"),
        tag("strong", title),
        f", {stage.purpose}",
        bar,
        tag("p", _words(found, seen.quiet), class_="muted") if found else None,
    )


def _words(found: StageProgress, quiet: bool) -> str:
    """How far a stage is, in a line; without what changes from one look to the next if nothing has happened."""
    parts = []
    if found.done is not None:
        parts.append(f"{found.done:,} of {found.planned:,} {found.unit}")
    if found.state == "running" and found.remaining is not None and found.remaining > 0:
        parts.append(f"{console.duration(found.remaining)} left")
    at = time.strftime("%H:%M:%S UTC", time.gmtime(found.written))
    parts.append(f"nothing was heard of it since {at}" if quiet else f"at {at}")
    return ", ".join(parts)
