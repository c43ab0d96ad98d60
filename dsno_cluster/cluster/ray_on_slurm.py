"""A Ray cluster inside one Slurm allocation: the first node's task runs the head, every other task a worker.

Two such jobs can share a node: ports are chosen among the free ones, files are in the attempt's own folder,
and each task ends only the processes that it started. The batch script makes the token with which Ray's
processes authenticate, for one attempt, and passes it in the environment, which other users cannot see; no
command line, file or log contains it. The dashboard listens on loopback.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsno_cluster import console
from dsno_cluster.cluster.ray_folder import INSIDE, claimed, place_for
from dsno_cluster.cluster.ray_pool import KEEP_MEMORY
from dsno_cluster.cluster.records import RayEnded, RayStarted
from dsno_cluster.cluster.rendezvous import free_ports, hear, own_address, tell
from dsno_cluster.cluster.slurm_commands import job_nodes, node_timeout, requeue_job
from dsno_cluster.errors import WorkError

START_SECONDS = 180.0  # many nodes that start Python from a network file system at once are slow
END_SECONDS = 5.0
LOST_HEAD_SECONDS = 20.0
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
    memory_gb: int
    job: str


@contextlib.contextmanager
def ray_head(node: Node, attempt: Path) -> Iterator[str]:
    """Run Ray's head on this node; yields its address, host:port. All its processes end with the context.

    Raises WorkError if it does not start.
    """
    address = own_address(node.hosts, node.index, node.interface)
    port, client, dashboard, *agents = free_ports(7)  # in one call, so that they differ
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


def ray_worker(node: Node, attempt: Path) -> None:
    """Run a Ray worker on this node until the head is gone.

    If the head's node is lost, this requeues the job: with --no-kill Slurm lets a job continue without a lost
    node, even if its batch script was lost with it. Raises WorkError if no head appears or this node's Ray
    ends by itself.
    """
    started = hear(attempt, RayStarted)
    head, folder = started.address, Path(started.folder)  # Ray's workers use the head's folder
    address = own_address(node.hosts, node.index, node.interface)
    with _ray_processes([f"--address={head}", *_common(node, address, free_ports(4))], folder) as ray:
        console.say(f"Ray worker on {socket.gethostname()}, {address}, joins {head}")
        answered = time.monotonic()
        while time.monotonic() - answered < LOST_HEAD_SECONDS:
            if (attempt / RayEnded.FILE).is_file():
                console.say(f"the head at {head} has ended; this node's Ray ends")
                return
            if (state := _knock(head)) == "open":
                answered = time.monotonic()
                if ray.poll() is not None:
                    raise WorkError(
                        f"Ray on {socket.gethostname()} ended by itself (status {ray.returncode})"
                    )
            time.sleep(1.0)
    if state == "closed":
        # its node answers, so only its process was killed: the batch script requeues the job once this task
        # has ended
        console.say(f"the head at {head} has ended without notice; this node's Ray ends")
        return
    _hear_of_first_node(node, attempt, head)


def _hear_of_first_node(node: Node, attempt: Path, head: str) -> None:
    """Requeue the job once Slurm reports that the head's node, which is silent, is lost."""
    first, patience = node.hosts[0], node_timeout() + SPARE_SECONDS
    console.say(
        f"the head at {head} is silent; waiting up to {patience:.0f} s for what Slurm says about {first}"
    )
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and not (attempt / RayEnded.FILE).is_file():
        if _knock(head) == "open":
            raise WorkError(f"{socket.gethostname()} was cut off from the head at {head} for a while")
        if first not in job_nodes(node.job, node.hosts):
            console.say(f"{first}, the first node, is lost: the job asks to be requeued")
            with contextlib.suppress(WorkError):  # another node was quicker
                requeue_job(node.job)
            return
        time.sleep(VERDICT_SECONDS + node.index - 1)


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
    deadline = time.monotonic() + START_SECONDS
    while _knock(f"{address}:{port}") != "open":
        if ray.poll() is not None or time.monotonic() > deadline:
            how = (
                f"ended with status {ray.returncode}"
                if ray.poll() is not None
                else f"is silent after {START_SECONDS:g} s"
            )
            raise WorkError(f"Ray's head on {socket.gethostname()} {how}")
        time.sleep(0.2)


def _knock(address: str) -> str:
    """The state of host:port: `open`, `closed` (the host answers that nothing listens there) or `silent`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return "closed"
    except OSError:
        return "silent"
    return "open"
