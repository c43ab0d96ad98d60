"""What does not end by itself on four real nodes: hung processes, wrong clocks, slow, full, unequal and contested nodes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_users import SLOW, User, last, ray_processes, wait_for
from test_slurm_faults import all_shards_made_once, checkpoints, finished, train_on_two_nodes
from test_slurm_faults import undisturbed as undisturbed
from test_slurm_faults import undisturbed_lines as undisturbed_lines
from testbed import CPUS, LOCAL_DISK, Cluster
from tiny import TINY

from dsno_cluster.cluster.records import AttemptProgress, Outcome
from dsno_cluster.cluster.runs import Run

pytestmark = [pytest.mark.cluster, pytest.mark.drill, pytest.mark.timeout(600)]

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")  # of Debian's faketime
TASK = "^[^ ]*python[^ ]* -u -m submitit"  # a rank or driver, as srun starts it

# sleeps for good in the middle of a step of rank 1's first attempt, in a function of torch
SLEEPER = """
import os, sys, threading, time
def when_torch_is_there():
    while not hasattr(sys.modules.get("torch.nn.functional"), "silu"):
        time.sleep(0.1)
    functional, calls = sys.modules["torch.nn.functional"], []
    silu = functional.silu
    def slow(*args, **more):
        calls.append(None)
        while len(calls) > 1000:
            time.sleep(60)
        return silu(*args, **more)
    functional.silu = slow
if (os.environ.get("SLURM_PROCID"), os.environ.get("SLURM_RESTART_COUNT")) == ("1", None):
    threading.Thread(target=when_torch_is_there, daemon=True).start()
"""


# a teacher that takes at least a second for a shard of 80 evaluations, however fast the machine is
LEISURELY = """
import time
from dataclasses import replace
from dsno_cluster import load_teacher

def teacher():
    quick = load_teacher("package:digits-teacher")
    def denoise(*inputs):
        time.sleep(0.0125)
        return quick.denoise(*inputs)
    return replace(quick, denoise=denoise)
"""


@pytest.mark.parametrize("how", ["frozen", "sleeps"])
def test_a_rank_that_hangs(
    how: str, disk_user: User, cluster: Cluster, tiny_data: Path, undisturbed: list[float]
) -> None:
    """Its guard ends it, the line names it and its host, and the training ends as if nothing had been."""
    disk_user.profile(hang_minutes=0.75)
    if how == "sleeps":
        (disk_user.home / "sitecustomize.py").write_text(SLEEPER)
    run = train_on_two_nodes(disk_user, tiny_data)
    wait_for(lambda: checkpoints(disk_user))
    if how == "frozen":
        cluster.run("pkill", "-STOP", "-f", TASK, host="node1")
    wait_for(lambda: "no progress for" in disk_user.row(run)["why"])
    said = wait_for(lambda: (row := disk_user.row(run))["state"] == "waiting" and row["last_error"])
    rank, place = {
        "frozen": ("rank 0 on node1", "no sign of life"),
        "sleeps": ("rank 1 on node2", "networks/"),
    }[how]
    assert said.startswith(f"{rank} hangs: ") and place in said, said
    finished(disk_user, run, undisturbed)
    assert disk_user.row(run)["attempts"] == 2


def test_an_actor_and_a_driver_that_hang(disk_user: User, cluster: Cluster) -> None:
    """The only actor is replaced; a frozen driver is ended by its guard, and the job is started again."""
    disk_user.profile(hang_minutes=0.5)
    run = disk_user.submit("gen-trajectories", *SLOW)
    wait_for(lambda: disk_user.shards_made() >= 3)
    cluster.run("pkill", "-STOP", "-f", "^ray::SolveActor", host="node1")
    before = disk_user.shards_made()
    wait_for(lambda: "no progress for" in disk_user.row(run)["why"])
    wait_for(lambda: disk_user.shards_made() >= before + 3)
    log = run.attempt(0).log(0).read_text()
    assert re.search(
        r"the actor on node1 \(process \d+\) hangs: it has given no sign of life .* another takes its place",
        log,
    )
    wait_for(lambda: "no progress" not in disk_user.row(run)["why"])
    cluster.run("pkill", "-STOP", "-f", TASK, host="node1")
    assert disk_user.ends(run)["attempts"] == 2
    outcome = run.attempt(0).read(Outcome)
    assert outcome is not None
    assert outcome.reason.startswith("the driver on node1 hangs: its process has given no sign of life")
    all_shards_made_once(disk_user)


def test_clocks_two_hours_apart(disk_user: User, cluster: Cluster, tiny_data: Path) -> None:
    """Only our processes: with such clocks munge refuses Slurm's own. Nothing compares times of two hosts."""
    if not FAKETIME.is_file():
        pytest.skip("sets clocks with Debian's faketime")
    clock = f"{LOCAL_DISK}/clock"
    disk_user.profile(environment={"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": clock})
    for node, shift in zip(cluster.node_names, ("+1h", "-1h", "+1h", "-1h"), strict=True):
        cluster.run("bash", "-c", f"echo '{shift}' >{clock}", host=node)
    try:
        run = disk_user.submit("gen-trajectories", *TINY, "--nodes", "2")
        assert disk_user.ends(run)["attempts"] == 1
        all_shards_made_once(disk_user, 6)
        run = disk_user.submit("train", *TINY, "--nodes", "2")
        assert disk_user.ends(run)["attempts"] == 1
        assert len(disk_user.losses()) == 4
    finally:
        for node in cluster.node_names:
            cluster.run("rm", clock, host=node)


def test_a_node_at_a_twentieth_of_its_speed(disk_user: User, cluster: Cluster) -> None:
    """The other node does most of the work, and again what the slow one holds at the end; `status` names the slow one."""
    (disk_user.home / "leisurely.py").write_text(LEISURELY)
    words = [*SLOW, "teacher.path=leisurely:teacher", "trajectories.num_samples=512"]
    theirs = "^ray::"
    loop = f"while :; do pkill -STOP -f '{theirs}'; sleep 1.9; pkill -CONT -f '{theirs}'; sleep 0.1; done"
    run = disk_user.submit("gen-trajectories", *words, "--nodes", "2")
    wait_for(lambda: disk_user.shards_made() >= 4)
    slowing = cluster.start("bash", "-c", loop, host="node2")
    try:
        wait_for(lambda: re.match(r"the actor on node2 .* is slow: \d+ s so far", disk_user.row(run)["why"]))
        wait_for(lambda: disk_user.shards_made() == 32, 240)
    finally:
        slowing.kill()
        cluster.run("pkill", "-f", "while :; do pkill", host="node2", check=False)
        cluster.run("pkill", "-CONT", "-f", theirs, host="node2", check=False)
    assert disk_user.ends(run)["attempts"] == 1
    all_shards_made_once(disk_user, 32)


def test_a_first_node_whose_folder_for_temporary_files_is_full_and_noexec(
    disk_user: User, cluster: Cluster, tiny_data: Path
) -> None:
    """Python and Ray take /tmp."""
    cluster.run("dd", "if=/dev/zero", f"of={LOCAL_DISK}/full", "bs=1M", host="node1", check=False)
    cluster.run("mount", "-o", "remount,noexec", LOCAL_DISK, host="node1")
    try:
        for stage in ("gen-trajectories", "train"):
            run = disk_user.submit(stage, *TINY, "--nodes", "1" if stage == "gen-trajectories" else "2")
            assert disk_user.ends(run)["attempts"] == 1
    finally:
        cluster.run("mount", "-o", "remount,exec", LOCAL_DISK, host="node1")
        cluster.run("rm", f"{LOCAL_DISK}/full", host="node1")


def test_a_first_node_without_free_ports(disk_user: User, cluster: Cluster) -> None:
    ports = Path("/proc/sys/net/ipv4/ip_local_port_range")
    usual = cluster.run("cat", ports, host="node1").stdout.split()
    with contextlib.ExitStack() as mended:

        def limit(first: str, last: str) -> None:
            cluster.run("bash", "-c", f"echo {first} {last} >{ports}", host="node1")

        limit("60000", "60040")
        mended.callback(limit, *usual)
        run = disk_user.submit("gen-trajectories", *TINY, "--nodes", "2")
        said = wait_for(lambda: (row := disk_user.row(run))["state"] == "waiting" and row["last_error"])
        assert said.startswith("node1 has no 64 free TCP ports (Address already in use); "), said
    assert disk_user.ends(run)["attempts"] == 2
    all_shards_made_once(disk_user, 6)


@contextlib.contextmanager
def cpus_of_first_node(cluster: Cluster, cpus: int) -> Iterator[None]:
    """In this context node1 has another number of CPUs than the others."""
    file = cluster.folder / "slurm.conf"
    usual, nodes = file.read_text(), f"NodeName=node[1-{cluster.nodes}] CPUs={CPUS}"

    def restart(text: str) -> None:
        cluster.stop_controller()
        cluster.kill_node("node1")
        file.write_text(text)
        cluster.start_controller()
        cluster.boot_node("node1")
        wait_for(lambda: len(cluster.idle_nodes()) == cluster.nodes, 60)

    memory = usual.partition(nodes)[2].partition("\n")[0]
    restart(usual.replace(nodes, f"NodeName=node1 CPUs={cpus}{memory}\n{nodes.replace('[1', '[2')}"))
    try:
        yield
    finally:
        restart(usual)


def test_nodes_with_different_numbers_of_cores(disk_user: User, cluster: Cluster) -> None:
    """A job for more nodes than are large enough is refused; the others get as many actors as they have room for."""
    with cpus_of_first_node(cluster, 1):
        disk_user.profile(cpus_per_task=2)
        words = [*TINY, *disk_user.storage, "--launcher", "slurm"]
        said = disk_user.dsno("gen-trajectories", *words, "--nodes", "4", status=2).stderr
        assert (
            "--nodes 4: partition main has 3 node(s) with the 2 CPUs and 1 GB of jobs/gen-trajectories.yaml"
            in said
        )
        assert len(said.splitlines()) == 1
        run = disk_user.submit("gen-trajectories", *SLOW, "--nodes", "3")
        actors = dict.fromkeys(cluster.node_names, 0)

        def counted() -> bool:
            for node in cluster.node_names:
                found = sum(line.startswith("ray::SolveActor") for line in ray_processes(cluster, node))
                actors[node] = max(actors[node], found)
            return actors == {"node1": 0, "node2": 2, "node3": 2, "node4": 2}

        wait_for(counted)
        assert disk_user.ends(run)["attempts"] == 1
        disk_user.profile(cpus_per_task=1)
        words = [*TINY, "name=all", f"storage.root={disk_user.home}/all"]
        said = disk_user.dsno("gen-trajectories", *words, "--nodes", "4", "--launcher", "slurm").stderr
        disk_user.ends(disk_user.run_of(said))


PREEMPTIONS = 4  # ten were tried once; one more than `retries` allows would do


@pytest.mark.timeout(900)
def test_preemptions_in_a_row(
    disk_user: User, cluster: Cluster, tiny_data: Path, undisturbed: list[float]
) -> None:
    """Training and generation side by side, each taken its nodes several times; `retries` is for other ends."""
    disk_user.profile(retries=0)
    training = train_on_two_nodes(disk_user, tiny_data, "training.checkpoint_every=100000")
    words = ["gen-trajectories", *SLOW, "name=made", f"storage.root={disk_user.home}/made"]
    making = disk_user.run_of(disk_user.dsno(*words, "--launcher", "slurm").stderr)
    preempted: dict[Run, int] = {training: 0, making: 0}

    def preempt() -> bool:
        for run, times in preempted.items():
            alive = disk_user.in_queue(run)  # one that was requeued begins at once
            new = len(run.attempts()) == times + 1 and last(run).read(AttemptProgress) is not None
            if alive and new and times < PREEMPTIONS:
                cluster.run("scontrol", "requeue", str(run.record().job), check=False)
                preempted[run] += 1
        return min(preempted.values()) == PREEMPTIONS

    wait_for(preempt, 600)
    finished(disk_user, training, undisturbed)
    disk_user.ends(making)
    for run in preempted:
        assert disk_user.row(run)["attempts"] == PREEMPTIONS + 1
