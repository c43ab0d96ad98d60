"""Chains: runs that continue on a cluster that forbids requeue."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cluster_users import SLOW, User, done_by, last, wait_for, why_ended, why_stopped
from test_slurm_faults import all_shards_made_once, finished, train_on_two_nodes
from test_slurm_faults import undisturbed as undisturbed
from test_slurm_faults import undisturbed_lines as undisturbed_lines
from test_slurm_hangs import LEISURELY
from testbed import Cluster
from tiny import TINY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

DRIVER = "^[^ ]*python[^ ]* -u -m submitit"


def queued(cluster: Cluster) -> list[str]:
    return cluster.run("squeue", "-h", "-o", "%i").stdout.split()


def test_the_next_job_of_a_chain_continues(disk_user: User, cluster: Cluster) -> None:
    """It begins at once, without the two minutes that Slurm lets a requeued job wait; the last one is not needed."""
    disk_user.profile(chain=3)
    run = disk_user.submit("gen-trajectories", *SLOW)
    first, second, third = run.record().jobs
    assert set(queued(cluster)) == {first, second, third}
    wait_for(lambda: disk_user.shards_made() >= 4)
    cluster.run("pkill", "-9", "-f", DRIVER, host="node1")
    row = disk_user.ends(run)
    assert (row["attempts"], row["job"]) == (2, second)
    assert [r["run"] for r in json.loads(disk_user.dsno("status", third, "--json").stdout)["runs"]] == [
        run.id
    ]
    assert "was killed by SIGKILL, from outside" in why_ended(run.attempt(0))
    assert re.search(r"\d+ of 24 shards are done", last(run).log(0).read_text())
    all_shards_made_once(disk_user)


def test_a_chain_is_cancelled_and_fails_as_one_run(disk_user: User, cluster: Cluster) -> None:
    disk_user.profile(chain=3, retries=0)
    run = disk_user.submit("gen-trajectories", *SLOW)
    refused = disk_user.dsno("gen-trajectories", *SLOW, *disk_user.storage, status=1).stderr
    assert "already, as job" in refused
    wait_for(lambda: disk_user.shards_made() >= 2)
    assert "cancelled" in disk_user.dsno("cancel", run.id).stderr
    row = disk_user.row(run)
    assert (row["state"], row["attempts"]) == ("cancelled", 1)
    wait_for(lambda: not queued(cluster), 30)

    (disk_user.home / "broken.py").write_text(
        "import os\nfrom dsno_cluster import load_teacher\n\n\ndef teacher():\n"
        "    if 'SLURM_JOB_ID' in os.environ:\n        raise RuntimeError('no such weights on this node')\n"
        "    return load_teacher('package:digits-teacher')\n"
    )
    bad = ["teacher.path=broken:teacher", "student.warm_start=false", "name=bad"]
    said = disk_user.dsno("run", *TINY, *disk_user.storage, *bad).stderr
    runs = [disk_user.run_of(line) for line in said.splitlines() if "submitted" in line]
    assert len(queued(cluster)) == 9
    row = disk_user.ends(runs[0], "failed")
    assert row["attempts"] == 1 and "no such weights on this node" in row["last_error"]
    for waiting in runs[1:]:
        row = disk_user.ends(waiting, "cancelled")
        assert row["attempts"] <= 1 and row["done"] is None


@pytest.mark.drill
def test_a_stage_begins_when_any_job_of_the_chain_before_it_is_done(
    disk_user: User, cluster: Cluster
) -> None:
    disk_user.profile(chain=2)
    said = disk_user.dsno("run", *TINY, "trajectories.steps=120", *disk_user.storage).stderr
    runs = [disk_user.run_of(line) for line in said.splitlines() if "submitted" in line]
    wait_for(lambda: disk_user.shards_made() >= 2)
    cluster.run("pkill", "-9", "-f", DRIVER, host="node1")
    attempts = [disk_user.ends(run)["attempts"] for run in runs]
    assert attempts == [2, 1, 1]
    assert not queued(cluster)


@pytest.mark.drill
def test_a_chain_outlives_preemption(
    disk_user: User, cluster: Cluster, tiny_data: Path, undisturbed: list[float]
) -> None:
    disk_user.profile(chain=3)
    run = train_on_two_nodes(disk_user, tiny_data, "training.checkpoint_every=100000")
    wait_for(lambda: done_by(run) > 20 if run.attempts() else False)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap", "sleep 5"]
    cluster.run(*urgent, cwd=disk_user.home)
    finished(disk_user, run, undisturbed)
    assert why_stopped(run.attempt(0)) == "preempted"
    assert disk_user.row(run)["attempts"] == 2


@pytest.mark.drill
def test_a_chain_outlives_its_time_limit(disk_user: User, cluster: Cluster) -> None:
    """Slurm looks at time limits every half minute: the work takes longer on any machine."""
    disk_user.profile(chain=3)
    (disk_user.home / "leisurely.py").write_text(LEISURELY)
    words = [*SLOW, "teacher.path=leisurely:teacher", "trajectories.num_samples=640"]
    run = disk_user.submit("gen-trajectories", *words)
    wait_for(lambda: disk_user.shards_made() >= 2)
    cluster.run("scontrol", "update", f"jobid={run.job}", "timelimit=1")
    row = disk_user.ends(run, seconds=400)
    assert row["attempts"] == 2 and why_ended(run.attempt(0)) == "its time limit was near"
    all_shards_made_once(disk_user, 40)
