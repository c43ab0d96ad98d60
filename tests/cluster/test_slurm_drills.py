"""Longer faults on four real nodes: jobs without a first node, suspended jobs, full disks, nodes that reboot."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cluster_users import SLOW, User, done_by, last, started, wait_for
from test_slurm_faults import (  # noqa: F401  (fixtures are found by their names)
    all_shards_made_once,
    checkpoints,
    finished,
    train_on_two_nodes,
    undisturbed,
    undisturbed_lines,
)
from testbed import Cluster
from tiny import small_disk

from dsno_cluster.cluster.records import Begin
from dsno_cluster.cluster.runs import Run

pytestmark = [pytest.mark.cluster, pytest.mark.drill, pytest.mark.timeout(600)]


def making_shards(user: User, *words: str) -> Run:
    """A run on two nodes that has made some shards, and has more to make."""
    run = user.submit("gen-trajectories", *SLOW, "--nodes", "2", *words)
    wait_for(lambda: user.shards_made() >= 6)
    return run


def lose_first_node(cluster: Cluster) -> None:
    cluster.kill_node("node1")
    cluster.declare_down("node1")


def resumed(user: User, run: Run) -> None:
    """The run is done in its second attempt, which made what was left."""
    assert user.ends(run)["attempts"] == 2
    assert "of 24 shards are done" in last(run).log(0).read_text()
    all_shards_made_once(user)


def test_the_first_node_lost_while_the_controller_is_silent(disk_user: User, cluster: Cluster) -> None:
    run = making_shards(disk_user)
    cluster.stop_controller()
    try:
        cluster.kill_node("node1")
        time.sleep(45)  # longer than the other node waits for the first one by itself
    finally:
        cluster.start_controller()
    cluster.declare_down("node1")
    resumed(disk_user, run)


def test_the_first_node_lost_by_a_job_that_may_not_be_requeued(disk_user: User, cluster: Cluster) -> None:
    disk_user.profile(sbatch={"no-requeue": True})
    run = making_shards(disk_user)
    lose_first_node(cluster)
    row = disk_user.ends(run, "failed")
    assert "node1, the first node, was lost; its profile says no-requeue" in row["last_error"]
    assert not disk_user.in_queue(run)


def test_the_first_node_lost_after_the_ray_of_the_other_one(disk_user: User, cluster: Cluster) -> None:
    run = making_shards(disk_user)
    cluster.run("pkill", "-9", "-x", "raylet", host="node2")
    said = wait_for(lambda: disk_user.row(run)["last_error"])
    assert said.startswith("continues without 1 node(s): Ray on node2 ended by itself"), said
    lose_first_node(cluster)
    resumed(disk_user, run)


def test_the_first_node_lost_after_the_task_of_the_other_one(disk_user: User, cluster: Cluster) -> None:
    """Nobody is left who could ask for anything: `status` does not call that running, and says what to do."""
    run = making_shards(disk_user)
    cluster.run("pkill", "-9", "-f", "^[^ ]*python[^ ]* -u -m submitit", host="node2")
    wait_for(lambda: disk_user.row(run)["last_error"])
    lose_first_node(cluster)
    wait_for(lambda: disk_user.row(run)["state"] != "running")
    row = disk_user.row(run)
    requeue = f"scontrol requeue {run.record().job}"
    assert row["state"] == "stalled" and f"`{requeue}` starts it again" in row["why"], row
    cluster.run(*requeue.split())
    resumed(disk_user, run)


def freeze(cluster: Cluster, kind: str) -> None:
    """Stop (or continue) Ray too: proctrack/cgroup suspends all processes of a job, proctrack/pgid only a step's own."""
    for node in cluster.node_names[:2]:
        cluster.run("pkill", f"-{kind}", "-f", "ray", host=node, check=False)


@pytest.mark.parametrize("stage", ["gen-trajectories", "train"])
def test_suspended_and_resumed(
    stage: str,
    disk_user: User,
    cluster: Cluster,
    tiny_data: Path,
    undisturbed: list[float],  # noqa: F811
) -> None:
    if stage == "train":
        run = train_on_two_nodes(disk_user, tiny_data)
        wait_for(lambda: checkpoints(disk_user))
    else:
        run = making_shards(disk_user)
    job = str(run.record().job)
    cluster.run("scontrol", "suspend", job)
    freeze(cluster, "STOP")
    time.sleep(60)
    assert disk_user.row(run)["state"] == "suspended"
    freeze(cluster, "CONT")
    cluster.run("scontrol", "resume", job)
    if stage == "train":
        finished(disk_user, run, undisturbed)
    else:
        disk_user.ends(run)
        all_shards_made_once(disk_user)
        # the other node worked to the end
        assert "has ended; this node's Ray ends" in last(run).log(1).read_text()
    row = disk_user.row(run)
    assert row["attempts"] == 1 and not row["last_error"], row


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_node_reboots_before_slurm_gives_it_up(node: str, disk_user: User, cluster: Cluster) -> None:
    """Slurm ends the step on all nodes, and the job is requeued."""
    run = making_shards(disk_user)
    cluster.kill_node(node)
    cluster.boot_node(node)
    resumed(disk_user, run)


def test_the_disk_of_the_run_folder_is_full(tmp_path: Path) -> None:
    """The job is started again, waits for room, and is then done; `status` says why."""
    with small_disk(tmp_path / "small", "128m"), started(2) as cluster:
        user = User.new(cluster, "full", on_s3=False)
        words = [*SLOW, "storage.root=out", f"run.dir={tmp_path}/small/run", "--nodes", "2"]
        run = user.run_of(user.dsno("gen-trajectories", *words, "--launcher", "slurm").stderr)
        wait_for(lambda: run.attempts() and done_by(run) >= 20)
        full = tmp_path / "small/full"
        cluster.run("dd", "if=/dev/zero", f"of={full}", "bs=4k", check=False)
        # the shards are elsewhere: it ends for another reason
        cluster.run("pkill", "-9", "-f", "^[^ ]*python[^ ]* -u -m submitit", host="node1")
        wait_for(lambda: queued(user, run) == "PENDING")
        assert "SIGKILL" in user.row(run)["last_error"]
        wait_for(
            lambda: user.in_queue(run) and queued(user, run) == "RUNNING"
        )  # on a disk that is full still
        time.sleep(15)
        assert not run.attempt(1).read(Begin) and queued(user, run) == "RUNNING"
        full.unlink()
        row = user.ends(run)
        assert row["attempts"] == 2 and not list(run.folder.glob("attempts/*/.*")), row
        assert "Traceback" not in (run.folder / "batch.log").read_text()


def queued(user: User, run: Run) -> str:
    """The state of a run's job in the queue."""
    listing = ["squeue", "-h", "-j", str(run.record().job), "-o", "%T"]
    return user.cluster.run(*listing, check=False).stdout.strip()
