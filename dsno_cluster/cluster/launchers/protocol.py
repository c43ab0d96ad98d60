"""The protocol of launchers, and the state of a run in plain words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsno_cluster.cluster.records import Outcome
from dsno_cluster.cluster.runs import Run

if TYPE_CHECKING:
    from dsno_cluster.cluster.stage import Stage, Submission
    from dsno_cluster.config import Profile

# as which an array with such tasks counts, the first that applies
_FIRST = ("running", "stalled", "suspended", "starting", "ending", "waiting", "state unknown")
LIVE = ("waiting", "starting", "running", "stalled", "ending", "suspended", "state unknown")


@dataclass(frozen=True)
class State:
    """The state of a run: a plain word, and why."""

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
        """Whether the stage becomes a run; if not, the command itself does the work."""

    def describe(self, submission: Submission) -> str | None:
        """For a dry run: the text that `submit` would submit, or None if there is none."""

    def check(self, submission: Submission) -> None:
        """Raises UserError for a stage that could never run here."""

    def submit(self, submissions: Sequence[Submission]) -> list[Run]:
        """Start stages, each of which begins when the one before is done. All are submitted, or none.

        Raises UserError for a stage that could never run, WorkError for one that cannot run now.
        """

    def states(self, runs: Sequence[Run]) -> dict[Run, State]:
        """The states of runs of this launcher whose last attempt left no final one."""

    def follow(self, run: Run) -> str:
        """Show the progress of a run until it ends.

        Returns its result. Raises UserError or WorkError if it fails.
        """

    def logs(self, run: Run, rank: int, attempt: int | None) -> Path | None:
        """The file with what a task of an attempt prints, if there is one yet."""

    def cancel(self, run: Run) -> None:
        """Ask for the end of a run. Finished work is kept."""


def state_of_array(states: Sequence[State]) -> State:
    """The state of an array from those of its tasks, in their order.

    It is done when one of them is, since each ends when all the work is done, and lives as long as one of them does.
    """
    if any(state.word == "done" for state in states):
        return State("done")
    alive = sorted((state for state in states if state.live), key=lambda state: _FIRST.index(state.word))
    if alive:
        words = Counter(state.word for state in states)
        waits = next((state.why for state in alive if state.word == "waiting" and state.why), "")
        why = ", ".join(f"{count} {word}" for word, count in words.items()) + (f": {waits}" if waits else "")
        return State(alive[0].word, why, ",".join(filter(None, (state.nodes for state in alive))))
    ended = {state.word: (place, state.why) for place, state in reversed([*enumerate(states)])}
    word = next(word for word in ("cancelled", "failed", *ended) if word in ended)
    place, why = ended[word]
    return State(word, f"task {place}: {why}" if why else "")


def final_state(run: Run) -> State | None:
    """The state that the last attempt's batch script noted, if it is final; of an array, if it is known without its launcher."""
    if tasks := run.tasks:
        states = [final_state(task) for task in tasks]
        known = [state for state in states if state is not None]
        done = any(state.word == "done" for state in known)
        return state_of_array(known) if done or len(known) == len(states) else None
    attempts = run.attempts()
    outcome = attempts[-1].read(Outcome) if attempts else None
    if outcome is None or outcome.state == "again":
        return None
    return State(outcome.state, outcome.reason)
