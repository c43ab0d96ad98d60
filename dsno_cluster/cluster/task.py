"""One task of a submitted job: the picklable `StageTask`, and how it ends.

A task finds its place among the others, runs its stage, and notes in the attempt's folder how it ended, for
the batch script, `status` and waiting commands. A signal that asks for the node (SIGUSR2: the time limit is
near; SIGTERM: another job needs it, or scancel) becomes `Preempted`, which unwinds the stage; then the job is
requeued, unless it was cancelled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from dsno_cluster import console
from dsno_cluster.cluster.noted_signals import NotedSignals
from dsno_cluster.cluster.records import AttemptProgress, Failure, Meeting, Result, Stopped, WhyStopped
from dsno_cluster.cluster.runs import Attempt, Run
from dsno_cluster.cluster.stage import Stage, StageOptions
from dsno_cluster.config import Profile
from dsno_cluster.errors import LONE_SIGNAL, Preempted, UserError, WorkError
from dsno_cluster.files import NO_ROOM
from dsno_cluster.storage import expect_answers

if TYPE_CHECKING:
    from dsno_cluster.cluster.ray_on_slurm import Node

REQUEUE_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
PLACE_IN_CHAIN = "DSNO_PLACE_IN_CHAIN"  # set by the script of a job in a chain
AGAIN_SECONDS = 1.0
LONE_SECONDS = (
    10.0  # how long a rank that got a signal to end waits for rank 0 to note that it got one as well
)
LOOK_SECONDS = 0.5
STOPS = {
    "time limit": "its time limit was near",
    "preempted": "another job or an administrator needed its nodes",
    "cancelled": "it was cancelled",
    "signal": "a process on its node signalled it to end",
}
_noted: NotedSignals | None = None


@dataclass(frozen=True)
class StageTask:
    """A stage of the experiment in a run folder."""

    stage: Stage[Any]
    options: StageOptions
    run_folder: str

    def __call__(self) -> str:
        from submitit import JobEnvironment

        run = Run(Path(self.run_folder))
        attempt = run.attempt(attempt_number())
        rank = JobEnvironment().global_rank
        attempt.folder.mkdir(parents=True, exist_ok=True)
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler
        expect_answers()  # the command that submitted this checked the address of the storage
        received: list[int] = []
        try:
            with _signals_unwind(received), _guarded(run, attempt, rank), _progress_noted(attempt, rank):
                address = self._run(run, attempt)
        except (KeyboardInterrupt, SystemExit) as stopped:
            _ignore_signals()
            # Ray turns a SIGTERM into SystemExit while it starts
            told = received or (isinstance(stopped, SystemExit) and stopped.code == signal.SIGTERM)
            if not told and not isinstance(stopped, Preempted):
                sys.exit(130 if isinstance(stopped, KeyboardInterrupt) else stopped.code)
            if rank == 0:
                _leave_for_later(run, attempt, requeue)
            elif self.stage.kind == "ranks" and _on_slurm() and not _rank_0_leaves(attempt):
                attempt.note(_failure("work", LONE_SIGNAL, rank))
                sys.exit(1)  # which ends the others: they would wait for this one
            sys.exit(0)  # rank 0 reports for all; an error status here would make Slurm end it too early
        except Exception as error:
            kind = _kind(error)
            reason = f"{type(error).__name__}: {error}" if kind == "bug" else str(error)
            attempt.note(_failure(kind, reason, rank))
            if kind == "bug":
                raise
            console.error(reason)
            sys.exit(2 if kind == "user" else 1)  # no traceback; the exit status ends the other ranks
        if rank == 0:
            attempt.note(Result(result=address))
        return address

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled by submitit, it notes signals until it is called: submitit's own handlers ignore some."""
        global _noted
        self.__dict__.update(state)
        if "SUBMITIT_EXECUTOR" in os.environ and threading.current_thread() is threading.main_thread():
            _noted = NotedSignals()

    def checkpoint(self) -> Any:
        """What submitit submits for a requeued job: the same task, which continues from its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _run(self, run: Run, attempt: Attempt) -> str:
        """Run the stage in this task's place among the others; returns where its results are."""
        config, profile = run.config(), run.profile()
        on_slurm = _on_slurm()
        if on_slurm and not profile.gpus_per_node:
            # Slurm allocated none, so visible GPUs are a neighbour's
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
        if self.stage.kind == "ranks":
            _set_rank_variables(attempt, profile, on_slurm)
        if self.stage.kind == "ranks" or not on_slurm:
            return self.stage.run(config, self.options, None, None).address
        from dsno_cluster.cluster.ray_on_slurm import ray_head, ray_worker

        node = _ray_node(profile)
        if node.index:
            ray_worker(
                node, attempt.folder, lambda error: attempt.note(_failure("work", str(error), node.index))
            )
            return "worker"
        with ray_head(node, attempt.folder) as address:
            return self.stage.run(config, self.options, address, None).address


def _on_slurm() -> bool:
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def _rank_0_leaves(attempt: Attempt) -> bool:
    """Whether rank 0 notes, within some seconds, that it was asked to end too, or that it has finished."""
    for _ in range(round(LONE_SECONDS / LOOK_SECONDS)):
        if attempt.read(Stopped) is not None or attempt.read(Result) is not None:
            return True
        time.sleep(LOOK_SECONDS)
    return False


def _kind(error: Exception) -> Literal["user", "work", "bug"]:
    """Whose fault an error is: that of the input, of the work's surroundings such as a full disk, or ours."""
    if isinstance(error, UserError):
        return "user"
    full = isinstance(error, OSError) and error.errno in NO_ROOM
    return "work" if full or isinstance(error, WorkError) else "bug"


def _failure(kind: Literal["user", "work", "bug"], reason: str, rank: int) -> Failure:
    return Failure(kind=kind, reason=reason, rank=rank, host=socket.gethostname())


def attempt_number() -> int:
    """The number of this start of its job, or of this job in its chain, from 0."""
    on_this_machine = os.environ.get("SUBMITIT_EXECUTOR") == "local"
    number = os.environ.get(PLACE_IN_CHAIN) or os.environ.get("SLURM_RESTART_COUNT")
    return 0 if on_this_machine else int(number or 0)


@contextlib.contextmanager
def _signals_unwind(received: list[int]) -> Iterator[None]:
    """In this context a signal that asks for the node raises Preempted; later ones are ignored.

    They are also added to `received`: while Ray waits in C, it turns what a handler raises into a plain
    KeyboardInterrupt. What is raised may be swallowed, by an import that ignores all errors or in a destructor;
    it is then raised again every second. An error into which others turn it on its way is Preempted again.
    """

    def unwind(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _ignore_signals()
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
        raise Preempted

    def unwind_again(number: int, frame: FrameType | None) -> None:
        if not _is_unwinding():
            raise Preempted

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGALRM, unwind_again)
    for number in REQUEUE_SIGNALS:
        signal.signal(number, unwind)
    for noted in _noted.end() if _noted is not None else ():
        if noted in REQUEUE_SIGNALS:
            unwind(noted, None)
    try:
        yield
    except Exception as error:
        if received:
            raise Preempted from error
        raise
    finally:
        _ignore_signals()  # done or failed: the rest takes only a moment, and says why


def _is_unwinding() -> bool:
    """Whether this thread is handling what ends the task, such as in a `finally`: it must not be disturbed."""
    error = sys.exception()
    while error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        error = error.__context__
    return error is not None


def _guarded(run: Run, attempt: Attempt, rank: int) -> contextlib.AbstractContextManager[None]:
    """In this context the task is ended if it hangs for good."""
    from dsno_cluster.cluster.guard import guarded

    role = ("the task" if rank else "the driver") if run.is_ray_stage else f"rank {rank}"
    return guarded(attempt.folder, rank, f"{role} on {socket.gethostname()}", run.profile().hang_minutes)


def _progress_noted(attempt: Attempt, rank: int) -> contextlib.AbstractContextManager[None]:
    """In this context the progress of rank 0 is noted in the attempt's folder."""
    if rank:
        return contextlib.nullcontext()
    return console.recording(lambda tally: attempt.write(AttemptProgress.of(tally)))


def _ignore_signals() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    for number in REQUEUE_SIGNALS:  # of one that has arrived already, SIG_IGN would make Python complain
        signal.signal(number, lambda number, frame: None)


def _leave_for_later(run: Run, attempt: Attempt, requeue: Any) -> None:
    """Note why this attempt stops.

    The batch script then requeues the job. A local job exits here, through submitit.
    """
    from dsno_cluster.cluster.slurm_commands import own_job, patiently, who_ends, why_told

    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        attempt.note(Stopped(why="time limit"))
        console.say("time is nearly up: the job asks to be requeued")
        sys.stdout.flush()
        if not callable(requeue):
            raise RuntimeError("submitit installed no handler to requeue the job")
        requeue(signal.SIGUSR2, None)  # leaves by SystemExit
    attempt.note(Stopped(why="signal"))  # for now: this process may be killed before Slurm answers
    if run.profile().container is not None:  # which need not have Slurm's commands: the batch script asks
        console.say("this job was asked to end: what is done is kept")
        return
    job = own_job()

    def ask() -> WhyStopped:
        ended = "cancelled" if run.cancelled else who_ends(job, attempt.number)
        return "preempted" if ended == "requeued" else ended or why_told(job, run.profile().save_seconds)

    why: WhyStopped = "signal"
    try:
        why = patiently(ask)
    except (UserError, WorkError) as error:
        console.say(f"Slurm does not report why this job must end: {error}")
    attempt.note(Stopped(why=why))
    console.say(f"{STOPS[why]}: what is done is kept")


def _set_rank_variables(attempt: Attempt, profile: Profile, on_slurm: bool) -> None:
    """Set RANK, WORLD_SIZE and the other variables that torch and DeepSpeed read."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if not on_slurm:
        # DeepSpeed picks cuda:LOCAL_RANK itself, so every device must stay visible to every rank
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return
    from dsno_cluster.cluster.rendezvous import free_ports, hear, interface_of, own_address, tell

    here = JobEnvironment()
    hosts = list(here.hostnames)
    address = own_address(hosts, here.node, profile.interface)
    if here.global_rank == 0:
        tell(attempt.folder, Meeting(address=address, port=free_ports(1)[0]))
    meeting = hear(attempt.folder, Meeting)
    os.environ.update(
        RANK=str(here.global_rank),
        WORLD_SIZE=str(here.num_tasks),
        LOCAL_RANK=str(here.local_rank),
        LOCAL_WORLD_SIZE=str(here.num_tasks // here.num_nodes),
        MASTER_ADDR=meeting.address,
        MASTER_PORT=str(meeting.port),
    )
    interface = profile.interface or interface_of(address)
    for library in ("GLOO", "NCCL"):  # the profile's environment and the user's shell take precedence
        if interface is not None:
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)


def _ray_node(profile: Profile) -> Node:
    from submitit import JobEnvironment

    from dsno_cluster.cluster.ray_on_slurm import Node

    here = JobEnvironment()
    gpus = 0
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # without GPUs, torch need not be imported
        from dsno_cluster.device import visible_gpus

        gpus = visible_gpus()
    hosts = list(here.hostnames)
    return Node(hosts, here.node, profile.interface, profile.cpus_per_task, gpus, profile.mem_gb, here.job_id)
