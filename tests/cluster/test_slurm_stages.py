"""The three stages on four real nodes: the same results as on one machine, and what a user and an administrator see."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from cluster_users import SLOW, User, done_by, last, ray_processes, wait_for, why_stopped
from testbed import Cluster
from tiny import TINY, dsno

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def local(root: Path, stage: str, *words: str) -> None:
    done = dsno(stage, *TINY, f"storage.root={root}", "--launcher", "local", *words)
    assert done.returncode == 0, done.stderr


def test_four_nodes_give_what_one_machine_gives(user: User, tmp_path: Path) -> None:
    window = "reader.window_shards=2"  # of six, so that not all shards stay open
    for stage in ("gen-trajectories", "train", "eval"):
        local(tmp_path, stage, window)
    made = user.submit("gen-trajectories", *TINY, "--nodes", "4")
    user.ends(made)
    (manifest,) = tmp_path.glob("trajectories/*/manifest.json")
    assert user.manifest()["shards"] == json.loads(manifest.read_text())["shards"]
    user.verify()

    trained = user.submit("train", *TINY, window, "--nodes", "4")
    user.ends(trained)
    said = trained.attempt(0).log(0).read_text()
    assert "on 4 rank(s)" in said and "each of the 4 ranks fetches every shard" in said
    lines = (tmp_path / "students/digits/metrics.jsonl").read_text().splitlines()
    assert user.losses() == pytest.approx([json.loads(line)["loss"] for line in lines], rel=5e-4)

    # the same checkpoint, so the same figures to the last digit
    student = user.home / "student"
    user.cluster.run("cp", "-r", tmp_path / "students/digits", student)
    evaluated = user.submit("eval", *TINY, "--nodes", "4", "--student", str(student))
    user.ends(evaluated)
    there = json.loads(user.read("evaluation/digits/metrics.json").partition("\n")[2])
    here = json.loads((tmp_path / "evaluation/digits/metrics.json").read_text())
    for key in ("fid", "trajectory_error", "agreement"):
        assert there["student"].get(key) == here["student"].get(key)
    assert [row["fid"] for row in there["teacher_rows"]] == [row["fid"] for row in here["teacher_rows"]]


def processes_of(cluster: Cluster, account: str, node: str) -> str:
    return cluster.run("ps", "-u", account, "-o", "args=", host=node, check=False).stdout


def test_a_user_without_privileges(cluster: Cluster) -> None:
    """Everything is done as the user who submits, and nothing of theirs is left on a node."""
    account = "daemon"  # one that every Debian has
    with cluster.python_for_all():
        user = User.new(cluster, "unprivileged", on_s3=False, account=account)
        for stage in ("gen-trajectories", "train", "eval"):
            run = user.submit(stage, *TINY, "--nodes", "2")
            user.ends(run)
            assert {file.owner() for file in run.folder.rglob("*")} == {account}
            assert run.folder.stat().st_mode & 0o077 == 0
        user.verify()
        cancelled = user.submit("gen-trajectories", *SLOW, "--nodes", "2")
        wait_for(lambda: user.shards_made() > 6)
        # the folder of Ray, whose own is open to everybody
        for node in ("node1", "node2"):
            (folder,) = ray_folders(cluster, node, "*").split()
            assert cluster.run("stat", "-c", "%a", folder, host=node).stdout.strip() == "700"
        # an administrator looks at it by its folder
        seen = cluster.run("dsno-cluster", "status", cancelled.folder, "--json").stdout
        assert json.loads(seen)["runs"][0]["state"] == "running"
        run.folder.chmod(0)
        listed = user.dsno("status", "--json")
        assert "left out: Permission denied" in " ".join(listed.stderr.split())
        assert cancelled.id in [row["run"] for row in json.loads(listed.stdout)["runs"]]
        run.folder.chmod(0o700)
        user.dsno("cancel", cancelled.id)
        assert why_stopped(cancelled.attempt(0)) == "cancelled"
        for node in ("node1", "node2"):
            wait_for(lambda node=node: not processes_of(cluster, account, node))
            left = cluster.run("find", "/mnt", "/dev/shm", "-user", account, host=node).stdout.splitlines()
            assert not [path for path in left if Path(path).name != f"torchinductor_{account}"]  # torch's own


def test_the_run_folder_holds_what_was_submitted(disk_user: User) -> None:
    run = disk_user.submit("gen-trajectories", *TINY, "trajectories.num_samples=16")
    record = run.record()
    assert record.stage == "gen-trajectories" and record.command.startswith("dsno-cluster gen-trajectories")
    head = disk_user.cluster.run("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD").stdout.strip()
    assert record.code.commit == head and isinstance(record.code.dirty, bool)
    assert (run.folder / "code/dsno_cluster/cli.py").is_file()
    config = (run.folder / "config.yaml").read_text()
    assert "num_samples: 16" in config
    assert f"root: {disk_user.home}/out" in config  # where it is, from any folder: this is what the job reads
    assert "mem_gb: 1" in (run.folder / "profile.yaml").read_text()
    submitted = (run.folder / "script.sh").read_text()
    (kept,) = run.folder.glob("submitit/*_submission.sh")
    assert kept.read_text() == submitted
    assert oct(run.folder.stat().st_mode)[-3:] == "700"
    disk_user.ends(run)
    assert "done:" in disk_user.dsno("logs", str(record.job)).stdout
    again = disk_user.submit("gen-trajectories", *TINY, "trajectories.num_samples=16")
    disk_user.ends(again)
    assert "exist already" in again.attempt(0).log(0).read_text()
    # a job runs the code that was there at submission, whatever became of the checkout since
    assert f"{run.folder}/code" in submitted


def test_what_cannot_run_is_refused_before_it_is_submitted(disk_user: User) -> None:
    words = ["gen-trajectories", *TINY, *disk_user.storage, "--launcher", "slurm"]

    def refused(*more: str, **profile: object) -> str:
        disk_user.profile(**profile)
        said = disk_user.dsno(*words, *more, status=2).stderr
        assert len(said.splitlines()) == 1, said
        return str(said)

    assert "--nodes 16: partition main has 4 node(s)" in refused("--nodes", "16")
    assert "partition nowhere: not on this cluster; it has main, urgent" in refused(partition="nowhere")
    assert "has at most 2 CPUs" in refused(cpus_per_task=3)
    assert "has at most 3.9 GB" in refused(mem_gb=5)
    assert "gpus_per_node 1: a node of partition main has at most 0" in refused(gpus_per_node=1)
    assert "time_minutes 1500: partition main allows 1440" in refused(time_minutes=1500)
    assert "takes 1" in refused(tasks_per_node=2)
    assert "Slurm refuses this job" in refused(constraint="a100")
    assert "looks like a secret" in refused(environment={"MY_SECRET": "x"})
    assert not list(disk_user.home.glob("run/jobs/*"))
    assert not disk_user.cluster.run("squeue", "-h").stdout


def test_two_jobs_share_nodes_and_touch_nothing_of_each_other(disk_user: User, cluster: Cluster) -> None:
    """Two Ray clusters on the same two nodes; one is cancelled, the other goes on. No token is seen anywhere."""
    disk_user.profile(sbatch={"nodelist": "node1,node2"})
    longer = [*SLOW, "trajectories.steps=120"]
    first = disk_user.submit("gen-trajectories", *longer, "--nodes", "2")
    other = ["name=second", f"storage.root={disk_user.home}/second"]
    said = disk_user.dsno("gen-trajectories", *longer, *disk_user.storage, *other, "--nodes", "2").stderr
    second = disk_user.run_of(said)
    both = [first, second]
    wait_for(lambda: all(run.attempts() and done_by(run) for run in both))
    for node in ("node1", "node2"):
        assert sum("raylet/raylet" in line for line in ray_processes(cluster, node)) == 2
    tokens = ray_tokens(cluster, "node1")
    assert len(tokens) == 2 and all(len(token) == 64 for token in tokens)
    seen = "".join(cluster.run("ps", "-eo", "args=", host=node).stdout for node in ("node1", "node2"))
    listening = cluster.run("ss", "-Hltn", host="node1").stdout.split()
    assert not told_without_a_token(cluster, "node1")
    for run in both:
        said = re.search(r"dashboard on this host's (127.0.0.1:(\d+))", run.attempt(0).log(0).read_text())
        assert said and [where for where in listening if where.endswith(f":{said[2]}")] == [said[1]]

    assert "cancelled" in disk_user.dsno("cancel", first.id).stderr
    assert disk_user.row(first)["state"] == "cancelled"
    for node in ("node1", "node2"):
        wait_for(lambda node=node: sum("raylet/raylet" in p for p in ray_processes(cluster, node)) == 1, 30)
    disk_user.ends(second)
    assert disk_user.row(second)["attempts"] == 1
    for node in ("node1", "node2"):
        assert not ray_processes(cluster, node)
        assert not ray_folders(cluster, node, str(second.record().job))
    written = "".join(
        f.read_text(errors="replace")
        for f in disk_user.home.rglob("*")
        if f.suffix in (".log", ".json", ".sh", ".yaml")
    )
    assert not [token for token in tokens if token in seen or token in written]

    # the same command finishes the cancelled one
    again = disk_user.submit("gen-trajectories", *longer, "--nodes", "2")
    disk_user.ends(again)
    assert re.search(r"\d+ of 24 shards are done", last(again).log(0).read_text())
    # nor of the cancelled one, even where Slurm killed it before it had tidied up
    for node in ("node1", "node2"):
        assert not ray_folders(cluster, node, "*")


def told_without_a_token(cluster: Cluster, node: str) -> list[str]:
    """Ports of a node that answer a neighbour's plain GET /metrics with anything but a refusal."""
    address = cluster.run("hostname", "-I", host=node).stdout.split()[0]
    listening = cluster.run("ss", "-Hltn", host=node).stdout.splitlines()
    ports = {line.split()[3].rpartition(":")[2] for line in listening}
    get = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read())"
    urls = [f"http://{address}:{port}/metrics" for port in ports]
    return [url for url in urls if cluster.run("python", "-c", get, url, check=False).stdout]


def ray_folders(cluster: Cluster, node: str, job: str) -> str:
    return cluster.run("find", "/mnt", "-name", f"dsno-ray-*-{job}-*", host=node).stdout


def ray_tokens(cluster: Cluster, node: str) -> set[str]:
    script = "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep ^RAY_AUTH_TOKEN="
    return {line.split("=")[1] for line in cluster.run("bash", "-c", script, host=node).stdout.split()}


def test_the_whole_path_as_one_submission(user: User) -> None:
    said = user.dsno("run", *TINY, *user.storage, "--nodes", "2").stderr
    runs = [user.run_of(line) for line in said.splitlines() if "submitted" in line]
    assert [run.record().stage for run in runs] == ["gen-trajectories", "train", "eval"]
    assert user.row(runs[2])["why"] == "for the stage before it"
    twice = user.dsno("run", *TINY, *user.storage, "--nodes", "2", status=1).stderr
    assert "already, as job" in twice
    watching = user.submit("eval", "--watch", *TINY)  # another thing than the evaluation that waits
    for run in [*runs, watching]:
        user.ends(run)
    assert len(user.losses()) == 4


def test_a_stage_that_fails_ends_those_that_wait_for_it(user: User) -> None:
    user.profile(retries=0)
    bad = ["teacher.path=broken:teacher", "student.warm_start=false"]
    (user.home / "broken.py").write_text(
        "import os\nfrom dsno_cluster import load_teacher\n\n\ndef teacher():\n"
        "    if 'SLURM_JOB_ID' in os.environ:\n        raise RuntimeError('no such weights on this node')\n"
        "    return load_teacher('package:digits-teacher')\n"
    )
    said = user.dsno("run", *TINY, *user.storage, *bad).stderr
    runs = [user.run_of(line) for line in said.splitlines() if "submitted" in line]
    row = user.ends(runs[0], "failed")
    assert "no such weights on this node" in row["last_error"]
    for run in runs[1:]:
        user.ends(run, "cancelled")


def test_waiting_and_following(disk_user: User) -> None:
    """--wait shows progress, Ctrl-C of it leaves the job; logs --follow ends with the run."""
    waiting = disk_user.start("gen-trajectories", *SLOW, *disk_user.storage, "--wait")
    runs = wait_for(lambda: json.loads(disk_user.dsno("status", "--json").stdout)["runs"][:1])
    run_id = runs[0]["run"]
    following = disk_user.start("logs", run_id, "--follow")
    wait_for(lambda: disk_user.shards_made() >= 2)
    time.sleep(3)
    disk_user.cluster.run("pkill", "-INT", "-f", "gen-trajectories.*--wait")
    said, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 130 and "the job continues" in said, said
    row = json.loads(disk_user.dsno("status", run_id, "--json").stdout)["runs"][0]
    assert row["state"] == "running" and row["rate"] > 0 and row["seconds_left"] > 0
    table = disk_user.dsno("status").stdout
    assert run_id in table and "trajectories" in table
    lines, _ = following.communicate(timeout=120)
    assert following.returncode == 0 and "done:" in lines, lines
    assert disk_user.row(disk_user.run_of(f"files: {row['folder']}"))["state"] == "done"
    for words, expected in (
        (["logs", run_id, "--rank", "7"], "has logs of ranks 0"),
        (["logs", run_id, "--attempt", "3"], "has had 1 attempt(s)"),
        (["logs", "nothing"], "no submitted run of that name"),
        (["cancel", "nothing"], "no submitted run of that name"),
    ):
        assert expected in disk_user.dsno(*words, status=2).stderr
    assert "done already" in disk_user.dsno("cancel", run_id).stderr


def test_a_submission_that_is_interrupted_is_known(disk_user: User) -> None:
    """Ctrl-C while sbatch takes its time: the job that it then submits is known, and taken back."""
    slow, begun = disk_user.home / "bin/sbatch", disk_user.home / "begun"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\ntouch {begun}\nsleep 3\nexec {shutil.which("sbatch")} "$@"\n')
    slow.chmod(0o755)
    path = f"{slow.parent}:{disk_user.cluster.environment()['PATH']}"
    words = ["dsno-cluster", "gen-trajectories", *SLOW, *disk_user.storage]
    several_threads = {"OMP_NUM_THREADS": "2"}  # any of which may get the signal
    submitting = disk_user.cluster.start(
        *words, cwd=disk_user.home, **disk_user.variables | {"PATH": path} | several_threads
    )
    wait_for(begun.exists)
    disk_user.cluster.run("pkill", "-INT", "-f", f"gen-trajectories.*{SLOW[-1]}")
    said, _ = submitting.communicate(timeout=30)
    assert submitting.returncode == 130 and "Traceback" not in said, said
    (row,) = json.loads(disk_user.dsno("status", "--json").stdout)["runs"]
    assert disk_user.ends(disk_user.run_of(f"files: {row['folder']}"), "cancelled")["job"]


def test_the_interface_can_be_named(disk_user: User, tiny_data: Path) -> None:
    disk_user.profile(interface="eth7")
    disk_user.cluster.run("cp", "-r", tiny_data / "trajectories", disk_user.home / "trajectories")
    storage = [f"storage.root={disk_user.home}", f"run.dir={disk_user.home}/run"]
    said = disk_user.dsno("train", *TINY, *storage, "--nodes", "2").stderr
    row = disk_user.ends(disk_user.run_of(said), "failed")
    assert "interface eth7: node1 has no such interface" in row["last_error"] and "eth0" in row["last_error"]
    assert row["attempts"] == 1  # what the user must mend is not tried again
