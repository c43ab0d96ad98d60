"""Arrays: tasks of one node each, which make one data set whoever of them comes, goes or stays away."""

from __future__ import annotations

import json
import re

import pytest
from cluster_users import SLOW, User, newest, wait_for
from test_slurm_chains import DRIVER, queued
from test_slurm_faults import all_shards_made_once
from testbed import Cluster
from tiny import TINY

from dsno_cluster.cluster.records import Outcome, Result

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_killed_tasks_are_made_up_for(disk_user: User, cluster: Cluster) -> None:
    """The others finish without waiting for the requeued ones, which then are not needed any more."""
    disk_user.profile(cpus_per_task=2)  # a node for each
    run = disk_user.submit("gen-trajectories", *SLOW, "--array", "2")
    again = disk_user.dsno("gen-trajectories", *SLOW, *disk_user.storage, "--array", "3", status=1).stderr
    assert "already, as job" in again
    wait_for(lambda: all(task.attempts() for task in run.tasks) and disk_user.shards_made() >= 2, 240)
    cluster.run("pkill", "-9", "-f", DRIVER, host="node1")
    row = disk_user.ends(run)
    assert row["run"] == run.id and row["job"] == run.record().job and row["attempts"] >= 2
    wait_for(lambda: not queued(cluster), 60)  # long before Slurm would start the requeued task
    (killed,) = (task for task in run.tasks if task.attempts()[0].read(Result) is None)
    outcome = killed.attempt(0).read(Outcome)
    assert outcome is not None and "was killed by SIGKILL, from outside" in outcome.reason
    all_shards_made_once(disk_user)
    (listed,) = json.loads(disk_user.dsno("status", "--json").stdout)["runs"]
    assert listed["state"] == "done"
    assert "done:" in disk_user.dsno("logs", run.id, "--rank", str(newest(run).run.record().place)).stdout
    assert "an array of 2 tasks" in disk_user.dsno("logs", run.id, "--rank", "2", status=2).stderr


@pytest.mark.drill
def test_an_array_is_cancelled_and_fails_as_one_run(disk_user: User, cluster: Cluster) -> None:
    disk_user.profile(cpus_per_task=2, retries=0)
    run = disk_user.submit("gen-trajectories", *SLOW, "--array", "6")
    wait_for(lambda: disk_user.shards_made() >= 2, 240)
    row = disk_user.row(run)
    assert row["state"] == "running" and re.search(r"\d running, \d waiting", row["why"]), row
    assert "cancelled" in disk_user.dsno("cancel", run.id).stderr
    assert disk_user.row(run)["state"] == "cancelled"
    wait_for(lambda: not queued(cluster), 30)
    before = disk_user.shards_made()
    run = disk_user.submit("gen-trajectories", *SLOW, "--array", "2")  # the same command, another number
    disk_user.ends(run)
    assert f"{before} of 24 shards are done" in disk_user.dsno("logs", run.id).stdout
    all_shards_made_once(disk_user)

    (disk_user.home / "broken.py").write_text(
        "import os\nfrom dsno_cluster import load_teacher\n\n\ndef teacher():\n"
        "    if 'SLURM_JOB_ID' in os.environ:\n        raise RuntimeError('no such weights on this node')\n"
        "    return load_teacher('package:digits-teacher')\n"
    )
    run = disk_user.submit(
        "gen-trajectories", *TINY, "teacher.path=broken:teacher", "name=bad", "--array", "2"
    )
    row = disk_user.ends(run, "failed")
    assert row["last_error"].startswith("task ") and "no such weights on this node" in row["last_error"]


@pytest.mark.drill
def test_tasks_that_are_held_requeued_and_late(disk_user: User, cluster: Cluster) -> None:
    """Of twelve there is room for four; one is requeued, and one is held for good."""
    disk_user.profile(cpus_per_task=2)
    run = disk_user.submit("gen-trajectories", *SLOW, "--array", "12")
    job = run.record().job
    cluster.run("scontrol", "hold", f"{job}_11")
    wait_for(lambda: disk_user.shards_made() >= 4, 240)
    cluster.run("scontrol", "requeue", f"{job}_0")
    wait_for(lambda: not queued(cluster), 240)
    assert disk_user.row(run)["state"] == "done"
    assert not run.tasks[11].attempts()
    all_shards_made_once(disk_user)
