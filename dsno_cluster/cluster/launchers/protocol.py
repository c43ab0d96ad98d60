"""What a launcher does, whichever it is, and the state of a run as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsno_cluster.cluster.records import Outcome
from dsno_cluster.cluster.runs import Run

if TYPE_CHECKING:
    from dsno_cluster.cluster.stage import Stage, Submission
    from dsno_cluster.config import Profile

LIVE = ("waiting", "starting", "running", "ending", "suspended", "state unknown")


@dataclass(frozen=True)
class State:
    """What a run is doing, in a plain word, and why."""

    word: str
    why: str = ""
    nodes: str = ""

    @property
    def live(self) -> bool:
        """Whether the run has not ended."""
        return self.word in LIVE


class Launcher(Protocol):
    """A place where stages run."""

    name: str
    detached: bool  # whether a run outlives the command that submits it

    def profile(self, stage: Stage[Any], nodes: int | None, tasks_per_node: int | None) -> Profile:
        """The stage's profile here, with the values that were asked for. Raises UserError if it does not suit the stage."""

    def takes(self, submission: Submission) -> bool:
        """Whether the stage becomes a run; if not, the command that was given does the work itself."""

    def describe(self, submission: Submission) -> str | None:
        """For a dry run: what `submit` hands on, or None if that is nothing to read."""

    def check(self, submission: Submission) -> None:
        """Raises UserError for what could never run here."""

    def submit(self, submissions: Sequence[Submission]) -> list[Run]:
        """Start stages, each to begin when the one before is done. All are submitted, or none.

        Raises UserError for what could never run, WorkError for what cannot run now.
        """

    def states(self, runs: Sequence[Run]) -> dict[Run, State]:
        """The states of runs of this launcher whose last attempt left no final one."""

    def follow(self, run: Run) -> str:
        """Show how a run fares until it ends; returns its result. Raises UserError or WorkError if it fails."""

    def logs(self, run: Run, rank: int, attempt: int | None) -> Path | None:
        """The file with what a task of an attempt prints, if there is one yet."""

    def cancel(self, run: Run) -> None:
        """Ask for the end of a run. What is done is kept."""


def final_state(run: Run) -> State | None:
    """The state that the last attempt's batch script left, if it is a final one."""
    attempts = run.attempts()
    outcome = attempts[-1].read(Outcome) if attempts else None
    if outcome is None or outcome.state == "again":
        return None
    return State(outcome.state, outcome.reason)
