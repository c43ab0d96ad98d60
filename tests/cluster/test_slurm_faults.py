"""What clusters do to jobs, done to ours on four real nodes: nothing is lost, doubled or half-written, and the work ends."""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path

import pytest
from cluster_users import SHARDS, SLOW, User, done_by, last, ray_processes, wait_for, why_ended, why_stopped
from testbed import Cluster
from tiny import TINY, dsno

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# a training of about a quarter of a minute, with a checkpoint every other second
LONG = [*TINY, "training.steps=120", "training.checkpoint_every=15", "training.lr_decay=none"]


@pytest.fixture(scope="module")
def undisturbed_lines(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """metrics.jsonl of LONG on two ranks that nothing disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    (root / "trajectories").symlink_to(tiny_data / "trajectories")
    local = ["training.threads=1", "--launcher", "local", "--tasks-per-node", "2"]
    done = dsno("train", *LONG, f"storage.root={root}", *local)
    assert done.returncode == 0, done.stderr
    lines = (root / "students/digits/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(undisturbed_lines: list[dict[str, float]]) -> list[float]:
    """The losses."""
    return [line["loss"] for line in undisturbed_lines]


def train_on_two_nodes(user: User, tiny_data: Path, *more: str) -> object:
    """Submit LONG on two nodes, with the finished small data set."""
    (user.home / "out").mkdir(exist_ok=True)
    if not (user.home / "out/trajectories").exists():
        user.cluster.run("cp", "-r", tiny_data / "trajectories", user.home / "out/trajectories")
    return user.submit("train", *LONG, "training.threads=1", "--nodes", "2", *more)


def checkpoints(user: User) -> list[int]:
    return sorted(int(p.name[5:]) for p in user.home.glob("run/students/digits/resume/step-*"))


def finished(user: User, run: object, undisturbed: list[float]) -> None:
    """The training ended with the loss curve of one that nothing disturbed: every step once, bit for bit."""
    user.ends(run)  # type: ignore[arg-type]
    assert user.losses() == undisturbed
    assert "steps 0 to" not in last(run).log(0).read_text()  # type: ignore[arg-type]  # it went on, not anew


def all_shards_made_once(user: User, count: int = SHARDS) -> None:
    assert len(user.manifest()["shards"]) == count == user.shards_made()
    user.verify()


def test_a_node_lost_while_shards_are_made(disk_user: User, cluster: Cluster) -> None:
    run = disk_user.submit("gen-trajectories", *SLOW, "--nodes", "2")
    wait_for(lambda: disk_user.shards_made() >= 4)
    cluster.kill_node("node2")  # Slurm finds out by itself, in half a minute; the work goes on before
    assert disk_user.ends(run)["attempts"] == 1
    all_shards_made_once(disk_user)


@pytest.mark.drill
def test_the_first_node_lost_while_shards_are_made(disk_user: User, cluster: Cluster) -> None:
    run = disk_user.submit("gen-trajectories", *SLOW, "--nodes", "2")
    wait_for(lambda: disk_user.shards_made() >= 6)
    cluster.kill_node("node1")
    cluster.declare_down("node1")  # as an administrator may, who does not wait for Slurm to notice
    # said while it waits, before another attempt begins
    said = wait_for(lambda: (row := disk_user.row(run))["state"] == "waiting" and row["last_error"])
    assert "after the loss of a node (node[1-2])" in said
    row = disk_user.ends(run)
    assert row["attempts"] == 2 and not row["last_error"]
    again = re.search(r"(\d+) of 24 shards are done", last(run).log(0).read_text())
    assert again and int(again[1]) >= 6
    all_shards_made_once(disk_user)


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.drill)], ids=["first", "other"])
def test_a_node_lost_while_training(
    index: int, disk_user: User, cluster: Cluster, tiny_data: Path, undisturbed: list[float]
) -> None:
    run = train_on_two_nodes(disk_user, tiny_data)
    wait_for(lambda: checkpoints(disk_user))
    node = cluster.node_names[index]
    cluster.kill_node(node)
    cluster.declare_down(node)
    finished(disk_user, run, undisturbed)
    assert disk_user.row(run)["attempts"] == 2


@pytest.mark.drill
def test_a_node_lost_while_a_student_is_evaluated(
    disk_user: User, cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """The other node finishes in the same attempt, with the figures of an evaluation that nothing disturbs."""
    (tmp_path / "trajectories").symlink_to(tiny_data / "trajectories")
    # about a quarter of a minute, in blocks of half a second
    words = [*TINY, "evaluation.num_samples=1000", "evaluation.teacher_steps=[1, 64]"]
    for stage in ("train", "eval"):
        done = dsno(stage, *words, f"storage.root={tmp_path}", "--launcher", "local")
        assert done.returncode == 0, done.stderr
    student = disk_user.home / "student"
    cluster.run("cp", "-r", tmp_path / "students/digits", student)
    run = disk_user.submit("eval", *words, "--nodes", "2", "--student", str(student))
    wait_for(lambda: done_by(run) >= 100)
    cluster.kill_node("node2")
    assert disk_user.ends(run)["attempts"] == 1
    there, here = (
        json.loads((root / "evaluation/digits/metrics.json").read_text())
        for root in (disk_user.home / "out", tmp_path)
    )
    assert there["teacher_rows"] == here["teacher_rows"] and len(here["teacher_rows"]) == 3
    for figure in ("fid", "agreement", "trajectory_error"):
        assert there["student"][figure] == here["student"][figure]


def test_scancel_saves_and_does_not_requeue(
    disk_user: User, cluster: Cluster, tiny_data: Path, undisturbed: list[float]
) -> None:
    run = train_on_two_nodes(disk_user, tiny_data, "training.checkpoint_every=100000")
    wait_for(lambda: done_by(run) > 20 if run.attempts() else False)
    cluster.run("scancel", str(run.record().job))  # by anybody, not through us
    row = disk_user.ends(run, "cancelled")
    assert row["attempts"] == 1 and len(checkpoints(disk_user)) == 1
    time.sleep(5)
    assert not cluster.run("squeue", "-h").stdout
    again = train_on_two_nodes(disk_user, tiny_data)
    finished(disk_user, again, undisturbed)


@pytest.mark.drill
def test_the_time_limit_is_reached(
    disk_user: User, tiny_data: Path, undisturbed_lines: list[dict[str, float]]
) -> None:
    """Steps of 25 seconds on this machine, when 28 seconds after a job's start, and so before that, it is told to save."""
    rate = statistics.median(line["images_per_second"] for line in undisturbed_lines) / 16
    steps = max(int(25 * rate), len(undisturbed_lines))
    disk_user.profile(time_minutes=1, save_seconds=32)
    run = train_on_two_nodes(
        disk_user, tiny_data, "training.checkpoint_every=100000", f"training.steps={steps}"
    )
    assert disk_user.ends(run)["attempts"] >= 2
    losses = disk_user.losses()
    assert len(losses) == steps
    assert losses[: len(undisturbed_lines)] == [line["loss"] for line in undisturbed_lines]
    assert "steps 0 to" not in last(run).log(0).read_text()
    assert why_stopped(run.attempt(0)) == "time limit"


@pytest.mark.drill
def test_the_time_limit_is_reached_while_shards_are_made(disk_user: User, cluster: Cluster) -> None:
    """An administrator cuts the limit when there are shards, so that there is something to keep on any machine."""
    twelve = ["trajectories.num_samples=192", "trajectories.steps=240"]
    run = disk_user.submit("gen-trajectories", *TINY, *twelve)
    wait_for(lambda: disk_user.shards_made() >= 2)
    job = f"jobid={run.record().job}"
    cluster.run("scontrol", "update", job, "timelimit=1")
    wait_for(lambda: why_stopped(run.attempt(0)))
    cluster.run("scontrol", "update", job, "timelimit=10")
    row = disk_user.ends(run)
    assert row["attempts"] == 2 and why_ended(run.attempt(0)) == "its time limit was near"
    assert re.search(r"([2-9]|1\d) of 12 shards are done", last(run).log(0).read_text())
    all_shards_made_once(disk_user, 12)


def test_preempted_by_a_job_of_higher_priority(
    disk_user: User, cluster: Cluster, tiny_data: Path, undisturbed: list[float]
) -> None:
    run = train_on_two_nodes(disk_user, tiny_data, "training.checkpoint_every=100000")
    wait_for(lambda: done_by(run) > 20 if run.attempts() else False)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap", "sleep 5"]
    other = cluster.run(*urgent, cwd=disk_user.home).stdout.strip()
    wait_for(
        lambda: "RUNNING" in cluster.run("squeue", "-h", "-j", other, "-o", "%T", check=False).stdout, 60
    )
    assert disk_user.row(run)["state"] == "waiting"
    finished(disk_user, run, undisturbed)
    assert why_stopped(run.attempt(0)) == "preempted"
    assert disk_user.row(run)["attempts"] == 2


@pytest.mark.parametrize("stage", ["gen-trajectories", "train"])
def test_requeued_by_an_administrator(
    stage: str, disk_user: User, cluster: Cluster, tiny_data: Path, undisturbed: list[float]
) -> None:
    if stage == "train":
        run = train_on_two_nodes(disk_user, tiny_data)
        wait_for(lambda: checkpoints(disk_user))
    else:
        run = disk_user.submit(stage, *SLOW, "--nodes", "2")
        wait_for(lambda: disk_user.shards_made() >= 4)
    cluster.run("scontrol", "requeue", str(run.record().job))
    if stage == "train":
        finished(disk_user, run, undisturbed)
    else:
        disk_user.ends(run)
        all_shards_made_once(disk_user)
    assert why_stopped(run.attempt(0)) == "preempted"
    assert disk_user.row(run)["attempts"] == 2


@pytest.mark.drill
def test_a_node_is_drained_and_the_controller_restarts(disk_user: User, cluster: Cluster) -> None:
    """What runs goes on; what asks for the drained node waits, and says so; the others can be asked for."""
    run = disk_user.submit("gen-trajectories", *SLOW, "--nodes", "2")
    wait_for(lambda: disk_user.shards_made() >= 2)
    cluster.run("scontrol", "update", "nodename=node1", "state=drain", "reason=fan")
    try:
        cluster.stop_controller()
        try:
            shown = disk_user.dsno("status", run.id, "--json")
            assert "Slurm does not report the states" in shown.stderr
            assert json.loads(shown.stdout)["runs"][0]["state"] == "state unknown"
            refused = disk_user.dsno("train", *TINY, *disk_user.storage, "--launcher", "slurm", status=2)
            assert "gen-trajectories" in refused.stderr  # there is no data set yet
            wait_for(lambda: disk_user.shards_made() >= 8)
        finally:
            cluster.start_controller()
        assert disk_user.ends(run)["attempts"] == 1
        all_shards_made_once(disk_user)

        words = [*TINY, "name=wide", f"storage.root={disk_user.home}/wide"]
        said = disk_user.dsno("gen-trajectories", *words, "--nodes", "4", "--launcher", "slurm").stderr
        waits = disk_user.run_of(said)
        wait_for(lambda: "nodes" in disk_user.row(waits)["why"].lower(), 60)
        assert disk_user.row(waits)["state"] == "waiting"
        disk_user.dsno("cancel", waits.id)
        said = disk_user.dsno("gen-trajectories", *words, "--nodes", "3", "--launcher", "slurm").stderr
        disk_user.ends(disk_user.run_of(said))
    finally:
        cluster.run("scontrol", "update", "nodename=node1", "state=resume")


def test_the_s3_server_restarts(user: User, cluster: Cluster) -> None:
    run = user.submit("gen-trajectories", *SLOW, "--nodes", "2")
    wait_for(lambda: run.attempts() and done_by(run) >= 48)
    cluster.stop_s3()
    time.sleep(5)
    cluster.start_s3()
    user.ends(run)
    assert len(user.manifest()["shards"]) == SHARDS
    user.verify()


@pytest.mark.drill
def test_a_node_whose_disk_is_full_is_done_without(disk_user: User, cluster: Cluster) -> None:
    cluster.run("dd", "if=/dev/zero", "of=/mnt/full", "bs=1M", host="node2", check=False)
    try:
        run = disk_user.submit("gen-trajectories", *TINY, "--nodes", "2")
        assert disk_user.ends(run)["attempts"] == 1
        assert len(disk_user.manifest()["shards"]) == 6
        disk_user.verify()
    finally:
        cluster.run("rm", "/mnt/full", host="node2")


@pytest.mark.drill
def test_a_job_that_can_never_succeed_is_given_up(disk_user: User) -> None:
    """Its teacher fails on every node; started again as often as the profile allows, then the reason is in `status`."""
    disk_user.profile(retries=1)
    (disk_user.home / "broken.py").write_text(
        "import os\nfrom dsno_cluster import load_teacher\n\n\ndef teacher():\n"
        "    if 'SLURM_JOB_ID' in os.environ:\n        raise RuntimeError('the GPU fell off')\n"
        "    return load_teacher('package:digits-teacher')\n"
    )
    run = disk_user.submit("gen-trajectories", *TINY, "teacher.path=broken:teacher")
    row = disk_user.ends(run, "failed")
    assert row["attempts"] == 2
    assert "given up: 2 attempts in a row made no progress" in row["last_error"]
    assert "the GPU fell off" in row["last_error"]


@pytest.mark.drill
def test_ranks_and_drivers_killed(
    disk_user: User, cluster: Cluster, tiny_data: Path, undisturbed: list[float]
) -> None:
    """kill -9 of a training rank and of the process that drives the actors: the job is started again by itself."""
    run = train_on_two_nodes(disk_user, tiny_data)
    wait_for(lambda: checkpoints(disk_user))
    cluster.run("pkill", "-9", "-f", "submitit.core._submit", host="node2")
    said = wait_for(lambda: (row := disk_user.row(run))["state"] == "waiting" and row["last_error"])
    assert "task 1 on node2 was killed by SIGKILL, from outside" in said
    finished(disk_user, run, undisturbed)
    assert disk_user.row(run)["attempts"] == 2

    words = ["gen-trajectories", *SLOW, f"storage.root={disk_user.home}/made", "name=made", "--nodes", "2"]
    made = disk_user.run_of(disk_user.dsno(*words, "--launcher", "slurm").stderr)
    wait_for(lambda: made.attempts() and done_by(made) >= 32)
    cluster.run("pkill", "-9", "-x", "raylet", host="node2")
    said = wait_for(lambda: disk_user.row(made)["last_error"])
    assert said.startswith("continues without 1 node(s): Ray on node2 ended by itself"), said
    cluster.run("pkill", "-9", "-f", "^[^ ]*python[^ ]* -u -m submitit", host="node1")
    row = disk_user.ends(made)
    assert row["attempts"] == 2 and not row["last_error"], row
    assert "task 0 on node1 was killed by SIGKILL, from outside" in why_ended(made.attempt(0))
    assert "shards are done" in last(made).log(0).read_text()
    assert not [p for node in cluster.node_names for p in ray_processes(cluster, node)]
