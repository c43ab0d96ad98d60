"""Tasks in containers, which see only what the launcher mounts."""

from __future__ import annotations

import sys

import pytest
from cluster_users import SLOW, User, done_by, wait_for, why_stopped
from containers import install
from test_slurm_faults import all_shards_made_once
from testbed import Cluster
from tiny import TINY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def contained(user: User, runtime: str, **values: object) -> None:
    """Profiles with a container, whose tools are on the job's path."""
    image = install(user.home, runtime)
    container = {"runtime": runtime, "image": str(image), "python": sys.executable}
    user.profile(container=container, setup=[f"export PATH={user.home}/bin:$PATH"], **values)


def test_two_nodes_make_shards_in_a_container(disk_user: User) -> None:
    contained(disk_user, "apptainer")
    run = disk_user.submit("gen-trajectories", *TINY, "--nodes", "2")
    assert disk_user.ends(run)["attempts"] == 1
    all_shards_made_once(disk_user, 6)


@pytest.mark.drill
@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_all_stages_in_a_container(runtime: str, disk_user: User) -> None:
    contained(disk_user, runtime)
    scratch = disk_user.home.with_name(f"{disk_user.home.name}-scratch")
    scratch.mkdir()
    (disk_user.home / "out").symlink_to(scratch)  # out of what is mounted anyway
    said = disk_user.dsno("run", *TINY, *disk_user.storage, "--nodes", "2").stderr
    runs = [disk_user.run_of(line) for line in said.splitlines() if "submitted" in line]
    assert len(runs) == 3
    for run in runs:
        assert disk_user.ends(run)["attempts"] == 1
        assert f"{run.folder}/code" in (run.folder / "script.sh").read_text()
    all_shards_made_once(disk_user, 6)
    assert len(disk_user.losses()) == 4


def test_an_image_that_is_not_there_is_refused(disk_user: User) -> None:
    disk_user.profile(container={"runtime": "apptainer", "image": "./nothing.sif"})
    words = ["gen-trajectories", *TINY, *disk_user.storage, "--launcher", "slurm"]
    said = disk_user.dsno(*words, status=2).stderr
    assert f"jobs/gen-trajectories.yaml: container.image: {disk_user.home}/nothing.sif: no such file" in said


@pytest.mark.drill
def test_in_a_container_faults_end_as_without(disk_user: User, cluster: Cluster) -> None:
    """Its tasks have no command of Slurm, so the batch script asks for them; a lost node is Slurm's to requeue."""
    contained(disk_user, "apptainer")
    run = disk_user.submit("gen-trajectories", *SLOW, "--nodes", "2")
    wait_for(lambda: disk_user.shards_made() >= 4)
    cluster.run("scontrol", "requeue", str(run.job))
    wait_for(lambda: disk_user.in_queue(run) and len(run.attempts()) == 2 and done_by(run))
    assert why_stopped(run.attempt(0)) == "preempted"
    cluster.kill_node("node2")
    cluster.declare_down("node2")
    assert disk_user.ends(run)["attempts"] == 3
    all_shards_made_once(disk_user)
