"""What `status` says of runs to which something happened: Slurm's own reasons, and no guess."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from cluster_users import SLOW, User, done_by, started, wait_for, why_ended, why_stopped
from testbed import ACCOUNTING_TOOLS, Cluster
from tiny import TINY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

LONG = [*TINY, "training.steps=120", "training.checkpoint_every=15", "training.lr_decay=none"]


def said_while_it_waits(user: User, run: object) -> str:
    """The last error that `status` shows of a run that was requeued."""

    def waiting() -> str:
        row = user.row(run)  # type: ignore[arg-type]
        return row["last_error"] if row["state"] == "waiting" else ""

    return str(wait_for(waiting, 240))


@pytest.mark.drill
def test_munge_ends_on_a_node_while_a_step_starts(disk_user: User, cluster: Cluster) -> None:
    begun, go = disk_user.home / "begun", disk_user.home / "go"
    wait = [f"touch {begun}", f"while [ ! -e {go} ]; do sleep 0.2; done"]
    disk_user.profile(setup=wait, sbatch={"nodelist": "node1,node2"})
    run = disk_user.submit("gen-trajectories", *TINY, "--nodes", "2")
    wait_for(begun.exists)
    cluster.stop_munge("node2")
    try:
        go.touch()
        said = said_while_it_waits(disk_user, run)
    finally:
        cluster.start_munge("node2")
    assert said.startswith("Slurm did not start the tasks on node2: ") and "mem" not in said, said
    row = disk_user.ends(run)
    assert row["attempts"] == 2 and not row["last_error"]
    assert f"attempt 0: {said}" in disk_user.dsno("status", run.id).stdout


@pytest.mark.drill
def test_a_node_reboots_while_training(disk_user: User, cluster: Cluster, tiny_data: Path) -> None:
    """Within Slurm's timeout, so that only srun notices."""
    (disk_user.home / "out").mkdir()
    cluster.run("cp", "-r", tiny_data / "trajectories", disk_user.home / "out/trajectories")
    disk_user.profile(sbatch={"nodelist": "node1,node2"})
    run = disk_user.submit("train", *LONG, "training.threads=1", "--nodes", "2")
    wait_for(lambda: run.attempts() and done_by(run) >= 16)
    cluster.kill_node("node2")
    cluster.boot_node("node2")
    said = said_while_it_waits(disk_user, run)
    assert "Slurm lost its connection to node2" in said or "Slurm lost node2" in said, said
    assert not disk_user.ends(run)["last_error"]


def test_a_job_that_slurm_cannot_launch_is_held(disk_user: User, cluster: Cluster) -> None:
    """A node's prolog fails: `status` names the command that lets the job start."""
    broken, conf = cluster.folder / "broken", cluster.folder / "slurm.conf"
    prolog, before = cluster.folder / "prolog.sh", conf.read_text()
    prolog.write_text(f"#!/bin/sh\n[ ! -e {broken} ]\n")
    prolog.chmod(0o755)
    broken.touch()
    conf.write_text(f"{before}Prolog={prolog}\n")
    cluster.run("scontrol", "reconfigure")
    try:
        run = disk_user.submit("gen-trajectories", *TINY)
        said = wait_for(lambda: "held" in (why := disk_user.row(run)["why"]) and why)
    finally:
        broken.unlink()
        conf.write_text(before)
        cluster.run("scontrol", "reconfigure")
        for node in cluster.node_names:
            cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    release = re.search("`(scontrol release .*)`", said)
    assert release and "could not launch it" in said, said
    cluster.run(*release[1].split())
    disk_user.ends(run)


@pytest.mark.drill
def test_a_signal_that_an_import_swallows_ends_the_attempt(disk_user: User, cluster: Cluster) -> None:
    """As when the time limit is near: the task ends in time, and the job is started again."""
    importing = disk_user.home / "importing"
    (disk_user.home / "slow.py").write_text(
        "import os, pathlib, time\nfrom dsno_cluster import load_teacher\n\n"
        "if os.environ.get('SLURM_RESTART_COUNT', '0') == '0' and 'SLURM_PROCID' in os.environ:\n"
        f"    pathlib.Path('{importing}').touch()\n"
        "    try:\n        time.sleep(100)\n    except:\n        pass\n    time.sleep(100)\n\n\n"
        "def teacher():\n    return load_teacher('package:digits-teacher')\n"
    )
    run = disk_user.submit("gen-trajectories", *TINY, "teacher.path=slow:teacher")
    wait_for(importing.exists)
    cluster.run("scancel", "--signal=USR2", str(run.record().job))
    assert disk_user.ends(run, seconds=90)["attempts"] == 2
    assert why_stopped(run.attempt(0)) and why_ended(run.attempt(0))


def test_a_home_folder_that_cannot_be_written(disk_user: User, cluster: Cluster) -> None:
    """The printed commands work, and the same work is not submitted twice."""
    (disk_user.home / "file").touch()
    variables = disk_user.variables | {"XDG_STATE_HOME": f"{disk_user.home}/file/state"}

    def dsno(*words: str, status: int = 0) -> str:
        command = ("dsno-cluster", *words)
        done = cluster.run(*command, cwd=disk_user.home, check=False, timeout=240, **variables)
        assert done.returncode == status, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    words = ["gen-trajectories", *SLOW, *disk_user.storage, "--launcher", "slurm"]
    said = dsno(*words)
    assert "keeps no link to this run" in said
    run = disk_user.run_of(said)
    wait_for(lambda: run.attempts() and done_by(run) > 0)
    twice = dsno(*words, status=1)
    assert "running already" in twice
    printed = re.findall(
        "`dsno-cluster ([^`]*)`", said.replace(" --follow", "") + twice.partition(", or ")[2]
    )
    assert [command.split()[0] for command in printed] == ["status", "logs", "cancel"]
    shown = [dsno(*shlex.split(command)) for command in printed]
    assert "running" in shown[0] and "Ray head" in shown[1] and "cancelled" in shown[2]
    assert run.id in dsno("status", "configs/digits.yaml", *disk_user.storage)


@pytest.mark.drill
def test_accounting_that_does_not_answer() -> None:
    """A job that the controller has forgotten has ended; how, only accounting knows, unless the run folder does."""
    if absent := [tool for tool in ACCOUNTING_TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"accounting needs {', '.join(absent)}: apt-get install slurmdbd mariadb-server")
    with started(1, accounting=True) as cluster:
        user = User.new(cluster, "frozen", on_s3=False)
        later = {"begin": "now+1hour"}
        user.profile(account="research", sbatch=later)
        ours, theirs = (user.submit("gen-trajectories", *TINY, f"name={name}") for name in ("ours", "theirs"))
        user.dsno("cancel", ours.id)
        cluster.run("scancel", str(theirs.record().job))
        jobs = {str(run.record().job) for run in (ours, theirs)}
        known = ["squeue", "-h", "-t", "all", "-o", "%i"]
        wait_for(lambda: not jobs & set(cluster.run(*known).stdout.split()))
        assert user.row(theirs)["state"] == user.row(ours)["state"] == "cancelled"
        cluster.signal_daemon("slurmdbd", signal.SIGSTOP)
        try:
            assert user.row(ours)["state"] == "cancelled"
            row = user.row(theirs)
            assert row["state"] == "ended" and "accounting does not answer" in row["why"]
            user.dsno("cancel", theirs.id)
            user.submit("gen-trajectories", *TINY, "name=theirs")  # it cannot be running
        finally:
            cluster.signal_daemon("slurmdbd", signal.SIGCONT)
        assert user.row(theirs)["state"] == "cancelled"
