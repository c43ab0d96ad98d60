"""What a pool knows of the life of its actors: which of them is slow, and which hangs and must be replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dsno_cluster import console, liveness

ASIDE = "aside"  # the concurrency group of an actor's thread that answers while the others work
ASK_SECONDS = 60.0  # how often busy actors are asked for a sign of life
NEW_SECONDS = 1.0  # how often their answers are looked for while some are new
# how often the actor that has worked longest is asked whether it waits for the storage, and its answer shown
STORAGE_SECONDS, SAY_SECONDS = 10.0, 60.0
# a task that takes this many times the median, and this long, makes its actor slow
SLOW, SLOW_SECONDS = 5.0, 10.0
KNOWN = 3  # so many tasks must be done before it is known how long one usually takes


@dataclass(frozen=True)
class ActorProcess:
    """Where an actor runs."""

    host: str
    id: int
    ray_node: str

    def __str__(self) -> str:
        return f"the actor on {self.host} (process {self.id})"


@dataclass(eq=False)
class Worker:
    """An actor, the number of its tasks, and what the pool last heard of its life."""

    actor: Any
    load: int = 0
    process: ActorProcess | None = None
    mark: str = ""
    where: str = ""
    asked: Any = None
    quiet: float = 0.0
    hangs: str = ""

    def __str__(self) -> str:
        return str(self.process or "an actor")


class Started(Protocol):
    """A task that a worker has begun."""

    worker: Worker
    began: float


class SlowWatch:
    """Names the actor that is much slower than the others, in the log and in `status`, as long as it is."""

    def __init__(self) -> None:
        self.looked, self.named = time.monotonic(), ""

    def look(self, running: Collection[Started], durations: Sequence[float]) -> None:
        now = time.monotonic()
        if now - self.looked < SLOW_SECONDS / 2 or len(durations) < KNOWN:
            return
        self.looked, usual = now, statistics.median(durations)
        late = min(running, key=lambda attempt: attempt.began, default=None)
        age = now - late.began if late is not None else 0.0
        if late is None or age < max(SLOW_SECONDS, SLOW * usual):
            self.named = ""
            console.remark("")
        elif (name := str(late.worker)) != self.named:
            self.named = name
            console.remark(f"{name} is slow: {age:.0f} s so far for what usually takes {usual:.2g} s")


class StorageWatch:
    """Asks the actor that has worked longest whether it waits for the storage, whose own words nobody would see."""

    def __init__(self) -> None:
        self.answer: Any = None  # the reference to an answer that has not come yet
        self.asked = time.monotonic()
        self.said = -SAY_SECONDS

    def listen(self, running: Collection[Started]) -> None:
        """Say the answer if there is one, and ask again if it is time to."""
        import ray

        now = time.monotonic()
        if self.answer is not None:
            if not ray.wait([self.answer], timeout=0)[0]:
                return
            with contextlib.suppress(ray.exceptions.RayError):  # it has died
                text = ray.get(self.answer)
                if text is not None and now - self.said >= SAY_SECONDS:
                    console.say(f"an actor reports: {text}")
                    self.said = now
            self.answer = None
        if not running or now - self.asked < STORAGE_SECONDS:
            return
        oldest = min(running, key=lambda attempt: attempt.began)
        ask = getattr(oldest.worker.actor, "silence", None)  # actors of other classes are not asked
        if ask is not None and now - oldest.began >= STORAGE_SECONDS:
            self.asked, self.answer = now, ask.remote()


class HangWatch:
    """Asks busy actors for a sign of life, and kills those whose work shows none for `liveness.limit_seconds`.

    A working actor answers with its threads' places in the code, which change; a frozen process does not answer.
    The time is counted in questions of this process, so that its own standstill counts for nothing.
    """

    def __init__(self) -> None:
        self.every = min(ASK_SECONDS, liveness.limit_seconds / 6)
        self.asked = self.looked = time.monotonic()
        self.new: set[Worker] = set()

    def welcome(self, worker: Worker) -> None:
        """Ask a new actor for its process, before it has work."""
        self._ask(worker)
        self.new.add(worker)

    def look(self, workers: set[Worker]) -> None:
        now = time.monotonic()
        if self.new and now - self.looked >= NEW_SECONDS:
            self.looked = now
            self._hear_new()
        if now - self.asked < self.every:
            return
        import ray

        self.asked = now
        asked = [worker.asked for worker in workers]
        answered = set(ray.wait(asked, num_returns=len(asked), timeout=0)[0]) if asked else set()
        for worker in workers:
            if worker.asked in answered:
                self._hear(worker)
                self._ask(worker)
            worker.quiet = worker.quiet + self.every if worker.load else 0.0
            if worker.quiet > liveness.limit_seconds:
                self._kill(worker)

    def _ask(self, worker: Worker) -> None:
        worker.asked = worker.actor.__ray_call__.options(concurrency_group=ASIDE).remote(_sign_of_actor)

    def _hear_new(self) -> None:
        """Hear the new actors that have answered: a line about an actor should name it from the beginning."""
        import ray

        asked = {worker.asked: worker for worker in self.new}
        for answer in ray.wait([*asked], num_returns=len(asked), timeout=0)[0]:
            self._hear(asked[answer])
            self.new.discard(asked[answer])

    def _hear(self, worker: Worker) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # it died; its tasks say so
            worker.process, sign = ray.get(worker.asked)
            if sign.mark != worker.mark:
                worker.quiet = 0.0
            worker.mark, worker.where = sign.mark, sign.where

    def _kill(self, worker: Worker) -> None:
        """End the actor's process by a signal from its own node: `ray.kill` does not always reach a frozen one."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        process, minutes = worker.process, f"{worker.quiet / 60:.3g} min"
        frozen = not ray.wait([worker.asked], timeout=0)[0]
        how = (
            f"has given no sign of life for {minutes}"
            if frozen
            else f"has been at {worker.where} for {minutes}"
        )
        worker.quiet, worker.hangs = 0.0, f"{worker} hangs: it {how}"
        console.say(f"{worker.hangs}; another takes its place (hang_minutes)")
        if process is None:
            ray.kill(worker.actor)
            return
        there = NodeAffinitySchedulingStrategy(process.ray_node, soft=False)
        ray.remote(num_cpus=0)(_kill_process).options(scheduling_strategy=there).remote(process.id)


def _kill_process(number: int) -> None:
    """Runs on the process's node."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def _sign_of_actor(actor: Any) -> tuple[ActorProcess, liveness.Sign]:
    """Runs in an actor: its process, and the sign of life of its work."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    return ActorProcess(socket.gethostname(), os.getpid(), node), liveness.sign_of_threads()
