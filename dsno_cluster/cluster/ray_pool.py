"""A Ray on this machine and a pool of its actors that pull work: for trajectories and for evaluation."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from dsno_cluster.errors import UserError, WorkError

Task = TypeVar("Task")

ATTEMPTS = 3


def default_actors(threads: int) -> int:
    """As many actors as this machine has GPUs, or else as its cores hold at `threads` each."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) // threads)


def import_ray() -> Any:
    """The ray module, set up before its first import, when it reads these variables.

    Token authentication is on, with a token made for this process, and no usage is reported.
    """
    if "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # what Ray does with the GPUs of actors that ask for none; without it, it warns of a change to come
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


def actor_resources(threads: int) -> dict[str, int]:
    """What an actor asks of Ray: its CPU threads, and a GPU where this machine has any."""
    import torch

    return {"num_cpus": threads, "num_gpus": 1 if torch.cuda.is_available() else 0}


@contextlib.contextmanager
def local_ray(actors: int, threads: int) -> Iterator[None]:
    """A Ray of our own on this machine, with room for `actors` of `threads` CPU threads; gone at the end.

    It has no dashboard.
    """
    ray = import_ray()
    devices = default_actors(threads)
    if actor_resources(threads)["num_gpus"] and actors > devices:
        raise UserError(f"--actors {actors}: this machine has {devices} GPU(s), and an actor takes one")
    try:
        ray.init(
            address="local",
            num_cpus=actors * threads,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    except (RuntimeError, ConnectionError, OSError) as error:
        raise WorkError(f"Ray did not start on this machine: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def run_pool(
    make_actor: Callable[[], Any],
    call: Callable[[Any, Task], Any],
    tasks: Sequence[Task],
    actors: int,
) -> Iterator[tuple[Task, Any]]:
    """Results of `call(actor, task)`, in the order they finish.

    Idle actors pull the next task. A task whose actor died or raised goes back to the queue; one that failed
    three times stops the run, with its reason, after the others are finished. A UserError stops it at once.
    """
    ray = import_ray()
    waiting: deque[Task] = deque(tasks)
    failures: dict[Any, list[BaseException]] = {}
    idle = [make_actor() for _ in range(min(actors, len(tasks)))]
    running: dict[Any, tuple[Any, Task]] = {}
    succeeded = False
    while waiting or running:
        while waiting and idle:
            actor, task = idle.pop(), waiting.popleft()
            running[call(actor, task)] = (actor, task)
        (ready,), _ = ray.wait(list(running), num_returns=1)
        actor, task = running.pop(ready)
        try:
            result = ray.get(ready)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, UserError):
                raise cause from error
            died = isinstance(error, ray.exceptions.RayActorError)
            if died and getattr(error, "actor_init_failed", False):
                raise WorkError(f"an actor cannot start: {_last_line(cause)}") from error
            idle.append(make_actor() if died else actor)
            failures.setdefault(task, []).append(cause)
            if len(failures[task]) < ATTEMPTS:
                waiting.append(task)
            if not succeeded and len(failures) >= ATTEMPTS:  # not this task's fault: a disk, a bucket, a bug
                raise WorkError(f"the first {len(failures)} tasks all failed: {_last_line(cause)}") from cause
            continue
        succeeded = True
        failures.pop(task, None)
        idle.append(actor)
        yield task, result
    if failures:
        task, causes = next(iter(failures.items()))
        raise WorkError(
            f"{len(failures)} of {len(tasks)} tasks failed {ATTEMPTS} times; the first, {task}: {causes[-1]}"
        )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
