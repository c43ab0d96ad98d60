"""Signals that end a training early: during steps they set a flag, and the loop stops at the end of its step.

Each update that an objective makes before the first step is treated as a step.

Saving is collective, so it cannot be done in a signal handler, and a signal may reach only one rank. Every
rank contributes its flag to the all-reduce at the end of each step; all then save together. SIGUSR2 (the time
limit is near) and SIGTERM (another job needs the nodes) end it as Preempted, after which it may be started
again, SIGINT (Ctrl-C) as KeyboardInterrupt.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

from dsno_cluster import console
from dsno_cluster.errors import Preempted
from dsno_cluster.training.ranks import Ranks, barrier

PREEMPT_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class StopSignals:
    """In this context, signals set `preempt` or `interrupt`; a second Ctrl-C raises at once.

    Before `steps_begin` there is nothing to save: the first signal raises Preempted or KeyboardInterrupt. If
    that is swallowed, such as by an import that ignores all errors, the training ends after its first step.
    """

    def __init__(self) -> None:
        self.preempt = self.interrupt = self.stepping = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # other threads cannot set signal handlers
            for number in (*PREEMPT_SIGNALS, signal.SIGINT):
                self.before[number] = signal.signal(number, self._set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def steps_begin(self) -> None:
        self.stepping = True

    def _set(self, number: int, frame: FrameType | None) -> None:
        again = self.interrupt
        if number == signal.SIGINT:
            self.interrupt = True
        else:
            self.preempt = True
        if not self.stepping:
            raise KeyboardInterrupt if number == signal.SIGINT else Preempted
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt


def leave(ranks: Ranks, where: str, *, preempted: bool) -> NoReturn:
    """End this rank, after all have saved `where` they are, by raising Preempted or KeyboardInterrupt."""
    if ranks.rank == 0:
        console.say(f"stopped by a signal: saved at {where}")
    barrier(ranks)  # no rank leaves before all know
    raise Preempted if preempted else KeyboardInterrupt
