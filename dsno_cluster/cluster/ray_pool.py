"""A Ray cluster (our own on this machine, or an existing one) and a pool of its actors that pull tasks."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from dsno_cluster import console, liveness
from dsno_cluster.cluster.actor_watch import ASIDE, HangWatch, SlowWatch, StorageWatch, Worker
from dsno_cluster.cluster.crew import Crew, actors_that_fit, default_actors, keep_to_share
from dsno_cluster.cluster.noted_signals import NotedSignals
from dsno_cluster.cluster.ray_folder import claimed, place_for
from dsno_cluster.errors import StorageError, UserError, WorkError
from dsno_cluster.provenance import Environment, environment
from dsno_cluster.storage import expect_answers, silence_now

Task = TypeVar("Task", bound=Hashable)

ATTEMPTS = 3  # a task that raised this often is given up
# a task is given up after this many of its actors died: machines fail now and then, but a crash repeats
DEATHS = 6
# this many tasks, spread over a long list, are tried first: if all of them fail alike, so would the others
PROBES = 16
# makes glibc's malloc keep freed memory. Otherwise the kernel maps and zeroes a layer's activations anew each
# time, which takes a quarter of Inception's time on a CPU
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}
MEMORY = "actors mostly die for lack of memory: use fewer of them (--actors), or more memory (mem_gb)"
CONCURRENCY = 3  # calls that an actor answers at a time: two tasks, and whether it waits for the storage
POLL_SECONDS = 1.0
STRAGGLER = 1.5  # a task that takes this many times the median may be run a second time by an idle actor
WAITING_SECONDS = 30.0
ELSEWHERE_SECONDS = 15.0  # how often it is asked which tasks others have done


class PoolActor:
    """What an actor of a pool does besides its work. Its methods are called from other threads than its tasks."""

    def __init__(self) -> None:
        expect_answers()
        keep_to_share()

    def environment(self) -> Environment:
        return environment()

    def silence(self) -> str | None:
        """The silence of the storage that this actor waits in, in words."""
        return silence_now()


@dataclass(frozen=True)
class RayCluster:
    """The Ray cluster in use. `num_gpus` is what an actor asks for, 0 if the cluster has no GPU."""

    threads: int
    num_gpus: float
    fixed: int | None  # number of actors, if it was given

    def actor_options(self) -> dict[str, Any]:
        """What an actor asks for; one of its threads is kept for questions of the pool (`HangWatch`)."""
        return {
            "num_cpus": self.threads,
            "num_gpus": self.num_gpus,
            "concurrency_groups": {ASIDE: 1},
        }

    def capacity(self) -> int:
        """How many actors the cluster has room for now; nodes may come and go."""
        if self.fixed is not None:
            return self.fixed
        nodes = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
        return sum(actors_that_fit(node, self.threads, self.num_gpus) for node in nodes)


def import_ray(own: bool = False) -> Any:
    """The ray module. `own`: for a Ray used only by this process; it reads its settings at the first import.

    Token authentication is then on, with a token made for this process. For an existing cluster Ray reads the
    way of authentication from RAY_AUTH_MODE and RAY_AUTH_TOKEN or ~/.ray/auth_token.
    """
    if "ray" not in sys.modules:
        if own:
            # for the actors, which inherit it; this process has read its own already
            os.environ.update(KEEP_MEMORY)
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # hides no GPUs from actors that ask for none; without this setting Ray warns of a coming change
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


def given_address(option: str | None) -> str | None:
    """The existing Ray cluster to use: the one named by an option, or else by RAY_ADDRESS; None: our own."""
    address = option or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def open_ray(crew: Crew, threads: int) -> contextlib.AbstractContextManager[RayCluster]:
    """The crew's Ray cluster, or our own Ray on this machine; released at the end."""
    address = given_address(crew.ray_address)
    if address is None:
        return local_ray(crew, threads)
    return _given_ray(address, crew, threads)


@contextlib.contextmanager
def local_ray(crew: Crew, threads: int) -> Iterator[RayCluster]:
    """Our own Ray on this machine, with room for the crew's actors of `threads` CPU threads; it ends with the context.

    It has no dashboard. Raises UserError for more actors than its GPUs have room for, WorkError if Ray does not start.
    """
    from dsno_cluster.device import visible_gpus

    ray = import_ray(own=True)
    gpus = visible_gpus()
    each = (crew.gpus_per_actor or 1) if gpus else 0
    room = default_actors(threads, gpus, each)
    actors = crew.actors or room
    if gpus and actors > room:
        share = "takes one" if each == 1 else f"takes {each:g}"
        raise UserError(
            f"--actors {actors}: this machine has {gpus} GPU(s), and an actor {share} (--gpus-per-actor); take at most {room}"
        )
    if actors == 0:
        raise UserError(f"--gpus-per-actor {each:g}: this machine has {gpus} GPU(s)")
    if crew.gpus_per_actor and not gpus:
        console.say(
            "note: this process sees no GPU, so actors compute on the CPU, whatever --gpus-per-actor is"
        )
    with claimed(place_for(f"here-{os.getpid()}")) as folder:
        try:
            with _sigterm_as_before():
                ray.init(
                    address="local",
                    num_cpus=actors * threads,
                    num_gpus=gpus,  # Ray would count those of the machine
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=True,
                    _temp_dir=str(folder),
                )
        except Exception as error:  # Ray raises plain Exceptions, for example if a node is slow to start
            raise WorkError(f"Ray did not start on this machine: {_last_line(error)}") from error
        try:
            yield RayCluster(threads, each, actors)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _sigterm_as_before() -> Iterator[None]:
    """Restore our SIGTERM handler after ray.init, whose own raises SystemExit even while unwinding.

    A SIGTERM that ray.init swallowed reaches our handler then. If we have none, Ray's stays: by default the
    process would die at once.
    """
    ours = signal.getsignal(signal.SIGTERM)
    if not callable(ours) or threading.current_thread() is not threading.main_thread():
        yield
        return
    noted = NotedSignals()
    try:
        yield
    finally:
        received = noted.end()
    signal.signal(signal.SIGTERM, ours)
    if signal.SIGTERM in received:
        ours(signal.SIGTERM, None)


@contextlib.contextmanager
def _given_ray(address: str, crew: Crew, threads: int) -> Iterator[RayCluster]:
    _check_listening(address)
    ray = import_ray()
    try:
        with _off_the_path(), _sigterm_as_before():
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True
            )
    except (RuntimeError, ConnectionError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise WorkError(f"Ray cluster {address}: cannot be joined: {_last_line(error)}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_gpus = (crew.gpus_per_actor or 1) if any(node.get("GPU") for node in nodes) else 0
        more = f" and {num_gpus:g} GPUs" if num_gpus > 1 else ""
        # whatever number of actors is asked for, none would start
        if not any(actors_that_fit(node, threads, num_gpus) for node in nodes):
            raise UserError(
                f"Ray cluster {address}: no node has the {threads} CPUs{more} that one actor takes (threads of the config); "
                "start its nodes with more, in a job by cpus_per_task of its profile"
            )
        room = sum(actors_that_fit(node, threads, num_gpus) for node in nodes)
        console.say(f"Ray cluster {address}: room for {room} actor(s) on {len(nodes)} node(s) now")
        yield RayCluster(threads, num_gpus, crew.actors)
    finally:
        ray.shutdown()


def _off_the_path() -> contextlib.AbstractContextManager[None]:
    """Enter the package's own folder if PYTHONSAFEPATH is set, as in a job with a copy of the code.

    Ray puts the current folder first on its actors' path, despite that setting.
    """
    safe = getattr(sys.flags, "safe_path", False)
    return contextlib.chdir(Path(__file__).parents[2]) if safe else contextlib.nullcontext()


def _check_listening(address: str) -> None:
    """Raises WorkError at once if nothing listens at host:port, which Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # "auto"
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise WorkError(f"Ray cluster {address}: nothing answers there ({error})") from error


@dataclass(eq=False)
class _Attempt(Generic[Task]):
    worker: Worker
    task: Task
    began: float


@dataclass
class _Failures(Generic[Task]):
    """The failures so far, by task."""

    raised: dict[Task, list[BaseException]] = field(default_factory=dict)
    died: dict[Task, int] = field(default_factory=dict)
    given_up: dict[Task, BaseException] = field(default_factory=dict)

    def add(self, task: Task, error: BaseException, *, died: bool) -> None:
        if died:
            self.died[task] = self.died.get(task, 0) + 1
        else:
            self.raised.setdefault(task, []).append(error)
        if len(self.raised.get(task, ())) >= ATTEMPTS or self.died.get(task, 0) >= DEATHS:
            self.given_up[task] = error

    def alike(self, tasks: Sequence[Task]) -> bool:
        """Whether each of the tasks raised, always with the same message except for the numbers in it."""
        errors = [error for task in tasks for error in self.raised.get(task, ())]
        causes = {(type(error), re.sub(r"\d+", "", _last_line(error))) for error in errors}
        return all(task in self.raised for task in tasks) and len(causes) == 1

    def all_died(self, tasks: Sequence[Task]) -> bool:
        """Whether two actors died under each of the tasks: machines do not fail that often by chance."""
        return all(self.died.get(task, 0) >= 2 for task in tasks)


def run_pool(
    make_actor: Callable[[], Any],
    call: Callable[[Any, Task], Any],
    tasks: Sequence[Task],
    capacity: Callable[[], int],
    *,
    in_flight: int = 1,
    in_order: bool = False,
    elsewhere: Callable[[], Collection[Task]] | None = None,
    greet: Callable[[Any], Any] | None = None,
    welcome: Callable[[Any], None] = lambda answer: None,
    release: Callable[[Any], None] | None = None,
) -> Generator[tuple[Task, Any], None, None]:
    """Results of `call(actor, task)`, once for each task, in the order in which they finish.

    Actors pull tasks, `in_flight` at a time. There are as many actors as `capacity()` says, which is asked
    repeatedly, so that nodes that join are used. `greet(actor)` is called first, and `welcome` gets its
    answer and raises for an actor that does not belong here. Near the end idle actors run the slowest tasks a
    second time (tasks must be idempotent) and the first answer counts. At the end every actor is passed to
    `release` (default: it is killed).

    A task whose actor died or raised returns to the queue; one that raised three times stops the run, with
    its reason, after the others are finished. Failures that are no task's fault stop it at once: a UserError,
    three StorageErrors with no success between them, and `PROBES` tasks spread over a longer list that all
    fail alike, or whose actors die, before any task succeeds. `in_order`: without such probes, so that tasks
    begin in their own order. `elsewhere()` gives the tasks that others have done by now, which have no result here;
    one that runs here is left a while to end.
    """
    ray = import_ray()
    greet = greet or (lambda actor: actor.__ray_ready__.remote())
    probes = list(tasks[:PROBES]) if in_order else _spread(tasks)
    waiting: deque[Task] = deque(dict.fromkeys([*probes, *tasks]))
    open_tasks = set(tasks)
    starting: dict[Any, Worker] = {}
    workers: set[Worker] = set()
    running: dict[Any, _Attempt[Task]] = {}
    failures: _Failures[Task] = _Failures()
    durations: list[float] = []
    hangs, slow = HangWatch(), SlowWatch()
    failed_starts = storage_failures = 0
    listener = StorageWatch()
    quiet_since = polled = asked = time.monotonic()
    known_elsewhere: set[Task] = set()
    try:
        room = told = capacity()
        while open_tasks:
            liveness.moved()
            hangs.look(workers)
            slow.look(running.values(), durations)
            if time.monotonic() - polled > POLL_SECONDS:
                before, room, polled = room, capacity(), time.monotonic()
                if room == before and room != told:  # say it once if many nodes join or leave together
                    console.say(f"Ray has room for {room} actor(s) now, {told} before")
                    told = room
            if elsewhere is not None and time.monotonic() - asked > ELSEWHERE_SECONDS:
                before_that, known_elsewhere = known_elsewhere, set(elsewhere())
                mine = {attempt.task for attempt in running.values()} - before_that
                open_tasks -= known_elsewhere - mine
                waiting = deque(task for task in waiting if task in open_tasks)
                asked = time.monotonic()
                continue
            while len(starting) + len(workers) < min(room, len(open_tasks)):
                worker = Worker(make_actor())
                starting[greet(worker.actor)] = worker
            _hand_out(waiting, open_tasks, workers, running, in_flight, durations, call)
            listener.listen(running.values())
            if not running and time.monotonic() - quiet_since > WAITING_SECONDS:
                console.say("waiting for actors: none has started yet, or Ray has no room for one now")
                quiet_since = time.monotonic()
            if not running and not starting:  # every node is gone, for now
                time.sleep(POLL_SECONDS)
                continue
            refs = [*running, *starting]
            ready, _ = ray.wait(refs, num_returns=1, timeout=POLL_SECONDS)
            # take all that are ready by now: with thousands of actors each call of ray.wait takes time
            if ready:
                ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            for ref in ready:
                if ref in starting:
                    worker = starting.pop(ref)
                    try:
                        welcome(ray.get(ref))
                    except ray.exceptions.RayError as error:
                        failed_starts += 1
                        if getattr(error, "actor_init_failed", False) or failed_starts >= DEATHS:
                            raise _start_failure(error) from error
                        continue
                    hangs.welcome(worker)
                    workers.add(worker)
                    failed_starts, quiet_since = 0, time.monotonic()
                    continue
                attempt = running.pop(ref)
                attempt.worker.load -= 1
                task = attempt.task
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayError as error:
                    died = isinstance(error, ray.exceptions.RayActorError)
                    cause = getattr(error, "cause", None) or error
                    if isinstance(cause, UserError):
                        raise cause from error
                    if attempt.worker.hangs:
                        cause = WorkError(attempt.worker.hangs)
                    if died:
                        workers.discard(attempt.worker)
                    if task not in open_tasks:
                        continue
                    failures.add(task, cause, died=died)
                    storage_failures += isinstance(cause, StorageError)
                    if storage_failures >= ATTEMPTS:  # no task's fault; the others would work in vain
                        raise cause from error
                    if task in failures.given_up:
                        open_tasks.discard(task)
                    elif all(other.task != task for other in running.values()):
                        waiting.append(task)
                    if len(tasks) > PROBES and not durations and failures.alike(probes):
                        # not the tasks' fault: a disk, a bucket, a bug
                        raise WorkError(
                            f"{len(probes)} tasks from all over the list failed alike and none succeeded: {_last_line(cause)}"
                        ) from cause
                    if len(tasks) > PROBES and not durations and failures.all_died(probes):
                        raise WorkError(
                            f"{len(probes)} tasks from all over the list each killed two actors and none succeeded: {MEMORY}"
                        ) from cause
                    continue
                storage_failures = 0
                if task in open_tasks:
                    open_tasks.discard(task)
                    durations.append(time.monotonic() - attempt.began)
                    yield task, result
    except (ray.exceptions.RaySystemError, ConnectionError) as error:
        raise WorkError(f"the Ray cluster was lost: {_last_line(error)}; the same command resumes") from error
    finally:
        console.remark("")
        for worker in [*workers, *starting.values()]:
            with contextlib.suppress(ValueError, RuntimeError, ray.exceptions.RayError):  # gone already
                (release or ray.kill)(worker.actor)
    if failures.given_up:
        task, cause = next(iter(failures.given_up.items()))
        memory = f"; {MEMORY}" if isinstance(cause, ray.exceptions.RayActorError) else ""
        raise WorkError(
            f"{len(failures.given_up)} of {len(tasks)} tasks failed again and again; "
            f"the first, {task}: {_last_line(cause)}{memory}"
        )


def _spread(tasks: Sequence[Task]) -> list[Task]:
    """At most PROBES of the tasks, evenly spread, including the first and the last."""
    if len(tasks) <= PROBES:
        return list(tasks)
    return [tasks[i * (len(tasks) - 1) // (PROBES - 1)] for i in range(PROBES)]


def _hand_out(
    waiting: deque[Task],
    open_tasks: set[Task],
    workers: set[Worker],
    running: dict[Any, _Attempt[Task]],
    in_flight: int,
    durations: list[float],
    call: Callable[[Any, Task], Any],
) -> None:
    """Give waiting tasks to the least loaded workers, and start slow ones a second time on idle workers."""

    def start(worker: Worker, task: Task) -> None:
        running[call(worker.actor, task)] = _Attempt(worker, task, time.monotonic())
        worker.load += 1

    for load in range(in_flight):
        for worker in [worker for worker in workers if worker.load == load]:
            if not waiting:
                break
            start(worker, waiting.popleft())
    idle = [worker for worker in workers if not worker.load]
    if waiting or not idle or not durations:
        return
    long_ago = time.monotonic() - STRAGGLER * statistics.median(durations)
    copies = Counter(attempt.task for attempt in running.values())
    slow = sorted(
        (a for a in running.values() if a.began < long_ago and copies[a.task] == 1 and a.task in open_tasks),
        key=lambda a: a.began,
    )  # fmt: skip
    for worker, attempt in zip(idle, slow, strict=False):
        start(worker, attempt.task)


def _start_failure(error: BaseException) -> Exception:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, UserError):
        return cause
    # if an actor's __init__ raises, Ray hands over only the text of the error
    line = _last_line(cause)
    if found := re.match(r"(dsno_cluster(?:\.\w+)*)\.(\w+): (.+)", line):
        kind = getattr(sys.modules.get(found[1]), found[2], None)
        for ours in (UserError, WorkError):
            if isinstance(kind, type) and issubclass(kind, ours):
                return ours(found[3])
    return WorkError(f"an actor cannot start: {line}")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
