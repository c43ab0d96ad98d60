"""Signals that end a training early: they set a flag, and the loop stops at its next step boundary.

Saving is collective, so it cannot be done in a signal's handler, and a signal may reach one rank alone. Every rank
brings its flag to the all-reduce at the end of each step; all then save together. SIGUSR2 (submitit: time is nearly up,
or another job needs the nodes) and SIGTERM ask to be requeued, SIGINT (Ctrl-C) to stop.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from dsno_cluster import console
from dsno_cluster.training.engine import Ranks

REQUEUE_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class StopSignals:
    """Within its context signals set `requeue` or `interrupt`; a second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.requeue = self.interrupt = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # signals cannot be handled in others
            for number in (*REQUEUE_SIGNALS, signal.SIGINT):
                self.before[number] = signal.signal(number, self._set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self.requeue = True
        elif self.interrupt:
            raise KeyboardInterrupt
        else:
            self.interrupt = True

    @property
    def requeue_handler(self) -> Callable[[int, FrameType | None], Any] | None:
        """What submitit does at SIGUSR2: pickle the task again and requeue the job; None without it."""
        handler = self.before.get(signal.SIGUSR2)
        return handler if callable(handler) and "SUBMITIT_EXECUTOR" in os.environ else None


def leave(stop: StopSignals, ranks: Ranks, step: int, requeue: bool) -> None:
    """End this rank after a checkpoint of `step`, which every rank has saved; never returns.

    Under submitit, where `requeue`, the job asks to be requeued. Otherwise raises KeyboardInterrupt.
    """
    main = ranks.rank == 0
    handler = stop.requeue_handler if requeue else None
    if handler is None:
        if main:
            console.say(f"stopped by a signal: saved at step {step}")
        raise KeyboardInterrupt
    if main:
        console.say(f"saved at step {step}; the job asks to be requeued")
    dist.barrier()  # nobody leaves before all know
    if main:
        handler(signal.SIGUSR2, None)  # leaves by SystemExit, or raises where time-outs are used up
    sys.stdout.flush()
    sys.exit(0)  # rank 0 requeues for all; an error status here would have Slurm kill it
