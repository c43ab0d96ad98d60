"""A Ray cluster inside one Slurm allocation: the first node's task runs the head, every other task a worker.

Two such jobs can share a node: ports are chosen among the free ones, files are in the attempt's own folder,
and each task ends only the processes that it started. The batch script makes the token with which Ray's
processes authenticate, for one attempt, and passes it in the environment, which other users cannot see; no
command line, file or log contains it. The dashboard listens on loopback.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsno_cluster import console, liveness
from dsno_cluster.cluster.guard import guards
from dsno_cluster.cluster.ray_folder import INSIDE, claimed, place_for
from dsno_cluster.cluster.ray_pool import KEEP_MEMORY
from dsno_cluster.cluster.records import Outcome, RayEnded, RayStarted
from dsno_cluster.cluster.rendezvous import free_ports, hear, own_address, tell
from dsno_cluster.cluster.runs import Attempt
from dsno_cluster.cluster.slurm_commands import (
    cancel_jobs,
    job_nodes,
    may_heal,
    node_timeout,
    patiently,
    requeue_job,
)
from dsno_cluster.errors import UserError, WorkError

START_SECONDS, START_PAUSE = (
    180.0,
    0.2,
)  # many nodes that start Python from a network file system at once are slow
END_SECONDS = 5.0
PORTS = 64  # a node without that many free ports cannot run Ray, which opens some itself and would not say so
LOST_HEAD_KNOCKS, KNOCK_SECONDS = 8, 2.0  # with the second between them: about 24 s
# how often the first worker asks Slurm; each further one waits a second longer, so that many do not ask at
# once
VERDICT_SECONDS, SPARE_SECONDS = 5.0, 60.0
# when we end Ray, its tasks are done or returned: there is nothing to drain, and Slurm allows little time
RAY_ENVIRONMENT = {
    **KEEP_MEMORY,
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # Slurm bounds the job's memory; Ray sees the node's, and would kill actors for a neighbour's usage
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray serves metrics by plain HTTP to everybody, two of them at fixed ports, which would collide with a
    # second job's. At these invalid ports no server can start, and Ray continues without it.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "65536",
    "DASHBOARD_METRIC_PORT": "65536",
}
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Node:
    """This node's part in the allocation."""

    hosts: list[str]
    index: int
    interface: str | None
    cpus: int
    gpus: int
    memory_gb: int
    job: str


@contextlib.contextmanager
def ray_head(node: Node, attempt: Path) -> Iterator[str]:
    """Run Ray's head on this node; yields its address, host:port. All its processes end with the context.

    Raises WorkError if it does not start.
    """
    address = own_address(node.hosts, node.index, node.interface)
    port, client, dashboard, *agents = free_ports(PORTS)[:7]  # in one call, so that they differ
    folder = place_for(f"{node.job}-{attempt.name}")
    command = [
        *("--head", f"--port={port}", f"--ray-client-server-port={client}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder / INSIDE}"),
    ]
    with _ray_processes([*command, *_common(node, address, agents)], folder) as ray:
        _wait_for_port(address, port, ray)
        console.say(
            f"Ray head on {socket.gethostname()}, {address}:{port}; {len(node.hosts) - 1} other node(s) join; "
            f"dashboard on this host's 127.0.0.1:{dashboard}"
        )
        tell(attempt, RayStarted(address=f"{address}:{port}", folder=str(folder)))
        try:
            yield f"{address}:{port}"
        finally:
            with contextlib.suppress(OSError):  # a full disk: the workers then wait for Slurm's answer
                tell(attempt, RayEnded())


def ray_worker(node: Node, attempt: Path, report: Callable[[WorkError], None]) -> None:
    """Run a Ray worker on this node until the head is gone.

    If the head's node is lost, this requeues the job: with --no-kill Slurm lets a job continue without a lost
    node, even if its batch script was lost with it. So this also waits for the head's end after its own Ray
    has failed, which it passes to `report` at once. Raises WorkError then, or if no head appears.
    """
    started = hear(attempt, RayStarted)
    head, folder = started.address, Path(started.folder)  # Ray's workers use the head's folder
    try:
        address = own_address(node.hosts, node.index, node.interface)
        options = [f"--address={head}", *_common(node, address, free_ports(PORTS)[:4])]
        with _ray_processes(options, folder) as ray:
            console.say(f"Ray worker on {socket.gethostname()}, {address}, joins {head}")
            lost = _first_node_lost(node, attempt, head, ray)
    except WorkError as error:
        report(error)
        if _first_node_lost(node, attempt, head, None):
            _start_again(node, attempt)
        raise
    if lost:
        _start_again(node, attempt)


def _first_node_lost(node: Node, attempt: Path, head: str, ray: subprocess.Popen[bytes] | None) -> bool:
    """Wait until the head is gone; returns whether it is gone with its node.

    Raises WorkError if this node's `ray` ends by itself before that.
    """
    unanswered = 0  # a clock would also count the time in which this process is suspended
    while not (attempt / RayEnded.FILE).is_file():
        state = _knock(head)
        unanswered = 0 if state == "open" else unanswered + 1
        if state == "open" and ray is not None and ray.poll() is not None:
            raise WorkError(f"Ray on {socket.gethostname()} ended by itself (status {ray.returncode})")
        if unanswered >= LOST_HEAD_KNOCKS:
            if state == "closed":
                # its node answers, so only its process was killed: the batch script requeues the job once
                # this task has ended
                console.say(f"the head at {head} has ended without notice; this node's Ray ends")
                return False
            if _slurm_lost_first_node(node, attempt, head):
                return True
            unanswered = 0
        time.sleep(1.0)
    console.say(f"the head at {head} has ended; this node's Ray ends")
    return False


def _slurm_lost_first_node(node: Node, attempt: Path, head: str) -> bool:
    """Whether Slurm says that the head's node, which is silent, is lost; False once the head is not silent.

    As long as Slurm is silent too, this waits: perhaps nobody else is left to end the job. Raises WorkError if
    Slurm keeps the node for longer than it keeps one that is lost, or does not know the job.
    """
    first, pause = node.hosts[0], VERDICT_SECONDS + node.index - 1
    console.say(f"the head at {head} is silent; waiting for what Slurm says about {first}")
    waited, said = 0.0, ""
    while _knock(head) == "silent" and not (attempt / RayEnded.FILE).is_file():
        waited += pause
        verdict, patience = f"{first} is not lost", SPARE_SECONDS
        try:
            if first not in job_nodes(node.job):
                return True
            patience += node_timeout()
        except (UserError, WorkError) as error:  # in a container there may be no command of Slurm
            verdict = str(error)
            waited = 0.0 if may_heal(verdict) else waited
        if verdict != said:
            console.say(f"Slurm's answer: {verdict}")
            said = verdict
        if waited > patience:
            raise WorkError(
                f"{socket.gethostname()} does not reach the head at {head}; Slurm's answer: {verdict}"
            )
        time.sleep(pause)
    return False


def _start_again(node: Node, attempt: Path) -> None:
    """Requeue the job, whose batch script is lost; end it if another continues it, none may, or Slurm refuses."""
    here, lost = Attempt(attempt), f"{node.hosts[0]}, the first node, was lost"
    profile, last = here.run.profile(), here.why_last
    if profile.requeue:
        console.say(f"{node.hosts[0]}, the first node, is lost: the job asks to be requeued")
        try:
            patiently(lambda: requeue_job(node.job, here.number), math.inf)
            return
        except WorkError as error:
            last = f"Slurm did not requeue the job: {error}"
    if last is None:
        here.note(Outcome(state="again", reason=lost))
    else:
        here.note(Outcome(state="failed", reason=f"{lost}; {last}"))
    patiently(lambda: cancel_jobs([node.job]), math.inf)


def _common(node: Node, address: str, agents: list[int]) -> list[str]:
    # Ray chooses the ports that are not named here (node manager, object manager, workers) among the free
    # ones
    agent, grpc, metrics, runtime_env = agents
    shared_memory = shutil.disk_usage("/dev/shm").free
    object_store = max(100 << 20, min(int(0.2 * node.memory_gb * 2**30), int(0.8 * shared_memory)))
    return [
        *(
            "--block",
            "--disable-usage-stats",
            "--include-log-monitor=false",
            f"--node-ip-address={address}",
            f"--num-cpus={node.cpus}",
            f"--num-gpus={node.gpus}",  # Ray would count those of the machine
        ),
        *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={object_store}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
        *(f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime_env}"),
    ]


@contextlib.contextmanager
def _ray_processes(options: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start` as a child in its own process group; at the end it and all that it started are gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Ray's daemons become our children when `ray start` ends, so that they can be found
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def end_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    with claimed(folder):
        ray = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # the sockets of Ray's dashboard, which nobody removes, are then deleted with the folder
            env={**os.environ, **RAY_ENVIRONMENT, "TMPDIR": str(folder)},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            yield ray
        finally:
            _end(ray)


def _end(ray: subprocess.Popen[bytes]) -> None:
    """End every process that descends from `ray start`: by SIGTERM, then by force, until none is left."""
    import psutil

    def descendants() -> list[psutil.Process]:
        alive = []
        for process in psutil.Process().children(recursive=True):
            if process.pid in guards:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                alive += [process] if process.status() != psutil.STATUS_ZOMBIE else []
        return alive

    with contextlib.suppress(ProcessLookupError):
        ray.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    while left := descendants():
        if time.monotonic() > deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.1)
    ray.wait()


def _wait_for_port(address: str, port: int, ray: subprocess.Popen[bytes]) -> None:
    for _ in range(round(START_SECONDS / START_PAUSE)):  # a clock would also count the time of a suspension
        if _knock(f"{address}:{port}") == "open":
            return
        if ray.poll() is not None:
            raise WorkError(f"Ray's head on {socket.gethostname()} ended with status {ray.returncode}")
        time.sleep(START_PAUSE)
    raise WorkError(f"Ray's head on {socket.gethostname()} is silent after {START_SECONDS:g} s")


def _knock(address: str) -> str:
    """The state of host:port: `open`, `closed` (the host answers that nothing listens there) or `silent`."""
    liveness.moved()
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
    except ConnectionRefusedError:
        return "closed"
    except OSError:
        return "silent"
    return "open"
