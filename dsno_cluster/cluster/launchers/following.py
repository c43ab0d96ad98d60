"""Following a run whose job is on another machine, to its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsno_cluster import console
from dsno_cluster.cluster.launchers.protocol import State, final_state
from dsno_cluster.cluster.records import AttemptProgress, Result
from dsno_cluster.cluster.runs import newest_attempts
from dsno_cluster.errors import UserError, WorkError

if TYPE_CHECKING:
    from dsno_cluster.cluster.runs import Run

POLL_SECONDS = 2.0
ASK_SECONDS = 15.0  # how often a launcher is asked while a run is followed, perhaps for days


def followed(run: Run, ask: Callable[[], State]) -> Callable[[], State]:
    """A function that gives the state of a run.

    It calls `ask` only when an attempt begins, and every `ASK_SECONDS`.
    """
    asked, begun, state = float("-inf"), -1, State("state unknown")

    def look() -> State:
        nonlocal asked, begun, state
        attempts = len(newest_attempts(run))
        if final := final_state(run):
            return final
        if time.monotonic() - asked > ASK_SECONDS or attempts != begun:
            state = ask()
            asked, begun = time.monotonic(), attempts
        return state

    return look


def wait_for(run: Run, ask: Callable[[], State]) -> str:
    """Follow a run to its end with live progress; returns its result. Ctrl-C leaves it running.

    Raises WorkError or UserError with its reason if it fails or is cancelled.
    """
    said, shown, look = "", None, followed(run, ask)
    with contextlib.ExitStack() as bar:
        advance: Callable[[int], None]
        while True:
            state = look()
            attempts = newest_attempts(run)
            text = f"{run.id}: {state.word}" + (f", {state.why}" if state.why and state.live else "")
            if text != said and state.live:
                console.say(text + (f" on {state.nodes}" if state.nodes else ""))
                said = text
            progress = attempts[-1].read(AttemptProgress) if attempts else None
            if progress:
                stretch = (attempts[-1].number, progress.title)
                if shown is None or shown[0] != stretch:
                    bar.close()
                    begun = console.progress(
                        progress.title, progress.total, progress.unit, done=progress.start
                    )
                    advance = bar.enter_context(begun)
                    shown = (stretch, progress.start)
                advance(progress.done - shown[1])
                shown = (stretch, progress.done)
            if not state.live:
                break
            time.sleep(POLL_SECONDS)
    for result in (attempt.read(Result) for attempt in attempts):
        if result is not None:
            return result.result
    failure = attempts[-1].failure() if attempts else None
    kind = UserError if failure and failure.kind == "user" else WorkError
    raise kind(f"{run.id} {state.word}: {state.why or 'see `dsno-cluster logs ' + run.word + '`'}")
