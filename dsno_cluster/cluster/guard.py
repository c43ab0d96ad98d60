"""A small process beside each task of a job, which ends the task if it hangs for good.

A thread of the task sends a sign of life every few seconds. The guard counts the signs that say the same, and
its own ticks without a sign: the process may be frozen. After `hang_minutes` of the profile it notes the reason,
the task and the host in the attempt's folder and kills the task, and the job is started again. The guard waits
twice as long for a rank that waits for others, because the guard of the rank that hangs names it first. The guard
ends with its task, and ignores the signals with which Slurm ends or warns a job.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dsno_cluster import liveness
from dsno_cluster.errors import LOST_RANK
from dsno_cluster.liveness import Sign

PULSE_SECONDS = 5.0
SILENCE_SECONDS = 1.5 * PULSE_SECONDS  # a sign is late
NOTE_SECONDS = 60.0  # how often the time without progress is noted, for `status`
_HEARS_NOT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

guards: set[int] = set()  # the ids of this process's guards, which are no part of its work


@contextlib.contextmanager
def guarded(attempt: Path, rank: int, what: str, minutes: float) -> Iterator[None]:
    """In this context a guard watches the calling thread, the work of task `rank`, called `what` in messages."""
    liveness.limit_seconds, liveness.guarded = 60 * minutes, True
    arguments = [str(os.getpid()), str(attempt), str(rank), what, str(liveness.limit_seconds)]
    guard = subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.PIPE,
        preexec_fn=_ignore_signals,  # from its beginning
    )
    assert guard.stdin is not None
    guards.add(guard.pid)
    done, pipe, thread = threading.Event(), guard.stdin, threading.get_ident()

    def send() -> None:
        with contextlib.suppress(
            OSError, ValueError
        ):  # the guard was killed, or its pipe closed: work without it
            while not done.is_set():
                pipe.write(json.dumps(asdict(liveness.sign_of(thread))).encode() + b"\n")
                pipe.flush()
                done.wait(PULSE_SECONDS)

    threading.Thread(target=send, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        guard.kill()
        guard.wait()
        guards.discard(guard.pid)


def _ignore_signals() -> None:
    for number in _HEARS_NOT:
        signal.signal(number, signal.SIG_IGN)


class Watch:
    """What a guard knows of its task."""

    def __init__(self, attempt: Path, rank: int, what: str, limit: float) -> None:
        self.attempt, self.rank, self.what, self.limit = attempt, rank, what, limit
        self.sign = Sign("", "its beginning")
        # seconds without a sign, with the same sign, without progress; and of the latter when last noted
        self.silent = self.same = self.idle = self.noted = 0.0

    def tick(self, sign: Sign | None) -> str | None:
        """Take a sign, or None for `SILENCE_SECONDS` without one; returns why the task must be ended, or None."""
        if sign is None:
            self.silent += SILENCE_SECONDS
            self.idle += SILENCE_SECONDS
        else:
            self.silent = 0.0
            self.same = self.same + PULSE_SECONDS if sign.mark == self.sign.mark else 0.0
            self.idle = self.idle + PULSE_SECONDS if sign.progress == self.sign.progress else 0.0
            self.sign = sign
        if self.rank == 0:
            self._note()
        if self.silent >= self.limit:
            return f"{self.what} hangs: its process has given no sign of life for {_minutes(self.silent)}"
        if self.same < self.limit:
            return None
        stuck = f"at {self.sign.where} for {_minutes(self.same)}"
        if not self.sign.waits:
            return f"{self.what} hangs: it has been {stuck}"
        if self.same < 2 * self.limit:
            return None
        return f"{LOST_RANK}, or does not answer: {self.what} has waited for it {stuck}"

    def _note(self) -> None:
        """Note, every minute, for how long there has been no progress, once that is a third of the limit."""
        begins, goes_on = self.idle >= self.limit / 3 and not self.noted, self.noted > 0
        if not begins and not goes_on:
            return
        from dsno_cluster.cluster.records import Idle, write_note

        with contextlib.suppress(OSError):  # a full disk
            if goes_on and self.idle < self.noted:
                self.noted = 0.0
                (self.attempt / Idle.FILE).unlink(missing_ok=True)
            elif begins or self.idle >= self.noted + NOTE_SECONDS:
                self.noted = self.idle
                write_note(Idle(seconds=self.idle), self.attempt)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.3g} min"


def main(arguments: list[str]) -> int:
    """The guard: watches its parent, the task, whose signs come by standard input, until that ends."""
    pid, folder, number, what, limit = arguments
    task, attempt, rank = int(pid), Path(folder), int(number)
    watch, received = Watch(attempt, rank, what, float(limit)), b""
    while True:
        ready, _, _ = select.select([0], [], [], SILENCE_SECONDS)
        sign = None
        if os.getppid() != task:
            return 0
        if ready:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return 0
            received += chunk
            *lines, received = received.split(b"\n")
            if not lines:
                continue
            sign = Sign(**json.loads(lines[-1]))
        if (reason := watch.tick(sign)) is not None:
            _end(task, attempt, rank, reason)
            return 0


def _end(task: int, attempt: Path, rank: int, reason: str) -> None:
    from dsno_cluster.cluster.records import Failure, write_note

    text = f"{reason}; it is killed (hang_minutes)"
    print(f"dsno-cluster: {text}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # a full disk: the task is killed all the same
        write_note(Failure(kind="work", reason=text, rank=rank, host=socket.gethostname()), attempt)
    os.kill(task, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
