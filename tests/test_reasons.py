"""What `status` says of runs is true: why attempts ended, by the lines that real Slurm printed; and how runs are found."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import answer

from dsno_cluster.cluster import slurm_commands
from dsno_cluster.cluster.reasons import oom_kills, why
from dsno_cluster.cluster.records import Begin, Failure, Outcome, Result
from dsno_cluster.cluster.runs import BATCH_LOG, Run, all_runs, create_run, find_run
from dsno_cluster.cluster.stage import Submission
from dsno_cluster.config import load_config, load_profile
from dsno_cluster.errors import LOST_RANK, UserError
from dsno_cluster.stages import GEN_TRAJECTORIES, TRAIN

# batch logs of Slurm 22.05: what srun and slurmstepd printed when each thing was done to a step on two nodes, whose
# second is node3 where it is rebooted or its power is cut
KILLED = """\
srun: error: node2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=1.0
srun: error: node1: task 0: Terminated
srun: Force Terminated StepId=1.0
"""
MUNGE_GONE_ELSEWHERE = """\
srun: error: slurm_receive_msgs: [[node2]:6818] failed: Zero Bytes were transmitted or received
srun: error: Task launch for StepId=3.0 failed on node node2: Zero Bytes were transmitted or received
srun: error: Application launch failed: Zero Bytes were transmitted or received
srun: Job step aborted: Waiting up to 17 seconds for job step to finish.
srun: error: node1: task 0: Killed
srun: launch/slurm: _step_signal: Terminating StepId=3.0
"""
MUNGE_GONE_HERE = """\
srun: error: If munged is up, restart with --num-threads=10
srun: error: Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file or directory (Did you start munged?)
srun: error: slurm_send_node_msg: auth_g_create: REQUEST_HET_JOB_ALLOC_INFO has authentication error
srun: error: Unable to confirm allocation for job 4: Protocol authentication error
srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 4
"""
REBOOT = """\
srun: error: _server_read: fd 12 error reading header: Connection reset by peer
srun: error: Aborting, io error and missing step on node 1
srun: Job step aborted: Waiting up to 17 seconds for job step to finish.
srun: error: node1: task 0: Killed
srun: launch/slurm: _step_signal: Terminating StepId=7.0
"""
POWER_CUT = """\
srun: error: Node failure on node3
slurmstepd-node1: error: *** JOB 8 ON node1 CANCELLED AT 2026-11-29T01:54:51 DUE TO NODE FAILURE, SEE \
SLURMCTLD LOG FOR DETAILS ***
srun: Job step aborted: Waiting up to 17 seconds for job step to finish.
srun: got SIGCONT
srun: forcing job termination
srun: error: node1: task 0: Terminated
srun: launch/slurm: _step_signal: Terminating StepId=8.0
"""
MEMORY_CGROUP = """\
srun: error: node1: task 0: Out Of Memory
srun: launch/slurm: _step_signal: Terminating StepId=1.0
"""
MEMORY_POLLED = """\
slurmstepd-node1: error: Exceeded job memory limit
srun: Job step aborted: Waiting up to 17 seconds for job step to finish.
slurmstepd-node1: error: Exceeded job memory limit
srun: error: node1: task 0: Killed
srun: launch/slurm: _step_signal: Terminating StepId=1.0
"""
CRASH = "srun: error: node2: task 1: Segmentation fault (core dumped)\n" + KILLED.partition("\n")[2]
LOST = "srun: error: node1: task 0: Exited with exit code 1\n"  # the rank that noticed it, long before Slurm


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run of Slurm job 17, which waits to be started again, with an attempt whose batch script left no outcome."""
    slurm_commands._configuration.cache_clear()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/squeue\n")
    (tools / "scontrol").write_text(
        "#!/bin/sh\n[ $2 = hostnames ] && printf 'node1\\nnode3\\n' || echo 'ClusterName = here'\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = new_run(tmp_path, "ranks")
    slurm_says(made, "PENDING", "BeginTime")
    yield made
    slurm_commands._configuration.cache_clear()


def new_run(root: Path, kind: str) -> Run:
    stage = TRAIN if kind == "ranks" else GEN_TRAJECTORIES
    config = load_config("configs/digits.yaml", [f"storage.root={root}"])
    made = create_run(Submission(stage, config, load_profile(stage.name, {}), "dsno-cluster"), snapshot=False)
    made.note(job="17", launcher="slurm")
    made.attempt(0).folder.mkdir(parents=True)
    made.attempt(0).write(Begin(job="17", nodes="node[1,3]"))
    return made


def slurm_says(run: Run, state: str, reason: str = "None") -> None:
    (run.folder.parents[1] / "squeue").write_text(f"17|{state}|{reason}||2026-01-01T00:00:00|node1\n")


def row(run: Run) -> dict[str, str]:
    return dict(json.loads(answer("status", str(run.folder), "--json").stdout)["runs"][0])


@pytest.mark.parametrize(
    ("log", "kind", "reason"),
    [
        (KILLED, "ranks", "task 1 on node2 was killed by SIGKILL, from outside"),
        (MUNGE_GONE_ELSEWHERE, "ranks", "Slurm did not start the tasks on node2: Zero Bytes were transmitted"),
        (MUNGE_GONE_ELSEWHERE, "ray", "Slurm did not start the tasks on node2: Zero Bytes were transmitted"),
        (MUNGE_GONE_HERE, "ranks", "Protocol authentication error (Munge encode failed: Failed to access"),
        (REBOOT, "ranks", "Slurm lost its connection to node3 (io error and missing step)"),
        (REBOOT, "ray", "Slurm lost its connection to node3 (io error and missing step)"),
        (POWER_CUT, "ranks", "Slurm lost node3"),
        (LOST + POWER_CUT, "ranks", "Slurm lost node3"),
        (MEMORY_CGROUP, "ranks", "task 0 on node1 ran out of memory, as Slurm reports (Out Of Memory): raise mem_gb"),
        (MEMORY_CGROUP, "ray", "task 0 on node1 ran out of memory, as Slurm reports (Out Of Memory): raise mem_gb"),
        (MEMORY_POLLED, "ranks", "it ran out of memory, as Slurm reports (Exceeded job memory limit): raise mem_gb"),
        (CRASH, "ranks", "task 1 on node2 crashed: SIGSEGV"),
        ("srun: error: node1: tasks 0-1: Killed\n", "ray", "tasks 0-1 on node1 were killed by SIGKILL"),
        (LOST, "ranks", LOST_RANK),
        ("", "ranks", LOST_RANK),
    ],
    ids=["killed", "munge elsewhere", "munge elsewhere, ray", "munge here", "reboot", "reboot, ray", "power", "power, noticed",
         "memory", "memory, ray", "memory polled", "crash", "driver killed", "another rank", "nothing"],
)  # fmt: skip
def test_the_reason_is_what_slurm_reported(log: str, kind: str, reason: str, run: Run) -> None:
    """Memory is named only if Slurm names it."""
    if kind == "ray":
        run.note(stage="gen-trajectories", kind="ray")
    if reason == LOST_RANK or LOST in log:
        run.attempt(0).write(Failure(kind="work", rank=0, reason=f"{LOST_RANK} (reset)"))
    (run.folder / BATCH_LOG).write_text(log)
    told = row(run)
    assert told["state"] == "waiting" and reason in told["last_error"]
    assert ("memory" in told["last_error"]) == ("emory" in log)


def test_memory_is_named_if_the_kernel_of_the_first_node_took_a_process(run: Run) -> None:
    """A process that the kernel really kills, in a small memory cgroup; Slurm, if it bounds no memory, knows nothing of it."""
    group = Path(f"/sys/fs/cgroup/memory/dsno-test-{os.getpid()}")  # version 1
    limit = "memory.limit_in_bytes"
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        group, limit = Path("/sys/fs/cgroup") / group.name, "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(64 << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    attempt = run.attempt(0)
    (run.folder / BATCH_LOG).write_text(f"srun: error: {socket.gethostname()}: task 0: Killed\n")
    try:
        attempt.write(Begin(job="17", nodes="node[1,3]", oom_kills=oom_kills()))
        assert "mem_gb" not in why(attempt, 137)
        eats = f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid())); x = b'1' * (1 << 30)"
        assert subprocess.run([sys.executable, "-c", eats], check=False).returncode == -signal.SIGKILL
        assert "killed 1 process(es) for lack of memory (mem_gb)" in why(attempt, 137)
        assert "mem_gb" not in why(attempt, None)  # on the login node, whose kernel is another
    finally:
        group.rmdir()


def test_a_later_attempts_lines_are_not_those_of_an_earlier_one(run: Run) -> None:
    log = run.folder / BATCH_LOG
    log.write_text(POWER_CUT)
    second = run.attempt(1)
    second.folder.mkdir()
    second.write(Begin(job="17", nodes="node[1,3]", batch_log_bytes=len(POWER_CUT)))
    log.write_text(POWER_CUT + KILLED)
    slurm_says(run, "RUNNING")
    assert row(run)["last_error"] == "Slurm lost node3"
    slurm_says(run, "PENDING")
    assert row(run)["last_error"].startswith("task 1 on node2 was killed by SIGKILL")


def test_a_run_that_is_done_shows_no_error(run: Run) -> None:
    run.attempt(0).write(Outcome(state="again", reason="Slurm lost node3"))
    second = run.attempt(1)
    second.folder.mkdir()
    second.write(Result(result="a student"))
    second.write(Outcome(state="done"))
    assert (row(run)["state"], row(run)["last_error"]) == ("done", "")
    assert "attempt 0: Slurm lost node3" in answer("status", run.id).stdout  # what happened is in its history


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (
            "launch failed requeued held",
            "could not launch it; when the cause is mended, `scontrol release 17`",
        ),
        ("JobHeldAdmin", "an administrator, who can let it start with `scontrol release 17`"),
        ("JobHeldUser", "its owner, until `scontrol release 17`"),
        ("BeginTime", "for its time to start"),
        ("Resources", "for free nodes"),
        ("Licenses", "Licenses"),
    ],
)
def test_what_a_job_waits_for(reason: str, said: str, run: Run) -> None:
    slurm_says(run, "PENDING", reason)
    assert said in row(run)["why"]


@pytest.mark.parametrize(
    ("state", "folder", "word", "why"),
    [
        ("CANCELLED", "", "cancelled", ""),
        ("FAILED", "cancelled", "cancelled", ""),
        ("FAILED", "", "failed", "its batch script left no word of its end"),
        ("NODE_FAIL", "", "failed", "a node was lost"),
        ("OUT_OF_MEMORY", "", "failed", "it needed more memory than mem_gb"),
        ("FAILED", "result", "done", ""),
        ("", "", "failed", "Slurm no longer knows the job; its batch script left no word"),
        ("", "cancelled", "cancelled", ""),
        ("", "result", "done", ""),
        ("frozen", "", "ended", "how is not known: Slurm's accounting does not answer"),
        ("frozen", "cancelled", "cancelled", ""),
        ("frozen", "result", "done", ""),
    ],
)
def test_the_end_of_a_run_whose_batch_script_said_nothing(
    state: str, folder: str, word: str, why: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's mark and Slurm's state count more than a guess; `frozen`: slurmdbd is asked and does not answer."""
    slurm_says(run, state)
    tools = run.folder.parents[1] / "bin"
    if state in ("", "frozen"):
        (run.folder.parents[1] / "squeue").write_text("")
    if state == "frozen":
        (tools / "scontrol").write_text(
            "#!/bin/sh\nprintf 'ClusterName = here\\nAccountingStorageType = accounting_storage/slurmdbd\\n'\n"
        )
        (tools / "sacct").write_text("#!/bin/sh\nexec sleep 60\n")
        (tools / "sacct").chmod(0o755)
        monkeypatch.setattr("dsno_cluster.cluster.slurm_commands.ACCOUNTING_SECONDS", 0.2)
    slurm_commands._configuration.cache_clear()
    if folder == "cancelled":
        run.cancel()
    if folder == "result":
        run.attempt(0).write(Result(result="a student"))
    told = answer("status", str(run.folder), "--json")
    (found,) = json.loads(told.stdout)["runs"]
    assert found["state"] == word and found["why"].startswith(why)
    assert bool(found["last_error"]) == (word == "failed")
    assert ("accounting does not answer" in told.stderr) == (state == "frozen")


def test_a_run_to_which_no_link_leads_is_found_by_its_folder_and_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The home folder is no folder that can be written to, or there is none."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file/state"))  # as root, a read-only folder is none
    root = tmp_path / "with a space"
    run = new_run(root, "ranks")
    assert "commands find it by its folder" in " ".join(capfd.readouterr().err.split())
    assert run.word == f"'{run.folder}'"
    assert find_run(str(run.folder)) == run and all_runs() == []
    with pytest.raises(UserError, match="a run's folder stands for it too"):
        find_run(run.id)
    config = ["configs/digits.yaml", f"storage.root={root}"]
    (listed,) = json.loads(answer("status", *config, "--json").stdout)["runs"]
    assert listed["run"] == run.id
    assert all_runs(run.config()) == [run]
    refused = answer("status", config[1])
    assert refused.returncode == 2 and "a config with its overrides" in refused.stderr


def test_the_id_of_a_run_elsewhere_is_not_given_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two experiments of one name, submitted in the same second."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-120000")
    first, second = new_run(tmp_path / "one", "ranks"), new_run(tmp_path / "two", "ranks")
    assert second.id == f"{first.id}-2"
    assert (find_run(first.word), find_run(second.word)) == (first, second)
