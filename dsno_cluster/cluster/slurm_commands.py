"""Questions and requests to Slurm, through its own commands. Works with and without accounting (sacct)."""

from __future__ import annotations

import functools
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from dsno_cluster import console, liveness
from dsno_cluster.config import Profile, slurm_minutes
from dsno_cluster.errors import UserError, WorkError

Answer = TypeVar("Answer")

CONTROLLER_SECONDS = 2.0
COMMAND_SECONDS = 60.0
ACCOUNTING_SECONDS = 5.0  # somebody waits for the answer, and it is not needed for what runs
# no word of Slurm's: the controller has forgotten the job, so it has ended; how, accounting does not say now
UNACCOUNTED = "UNACCOUNTED"
OUTAGE_SECONDS = 900.0  # a controller may be restarting when a job asks it something
REFUSED_SECONDS = 60.0  # or it may refuse for a moment, for example while a job is completing
PAUSE_SECONDS = 10.0
CLOCK_SECONDS = 15.0  # clocks of a cluster may differ by this much; munge refuses more than five minutes


@dataclass(frozen=True)
class JobState:
    """A job as Slurm reports it: state (PENDING, ...), reason to wait, nodes, end in local time, batch host."""

    state: str
    reason: str = ""
    nodes: str = ""
    end: str = ""
    batch_host: str = ""

    def seconds_over(self) -> float:
        """How long ago it ended; infinite if Slurm does not say, or by a clock that is ahead of this host's."""
        try:
            over = time.time() - time.mktime(time.strptime(self.end, "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            return float("inf")
        return over if over > -CLOCK_SECONDS else float("inf")


def controller_silence() -> str | None:
    """Why Slurm's controller cannot be used, or None if it answers."""
    try:
        ping = subprocess.run(
            ["scontrol", "ping"], capture_output=True, text=True, timeout=CONTROLLER_SECONDS, check=False
        )
    except FileNotFoundError:
        return "there is no scontrol on PATH"
    except subprocess.TimeoutExpired:
        return f"Slurm's controller did not answer within {CONTROLLER_SECONDS:g} s"
    return None if ping.returncode == 0 and " UP" in ping.stdout else "Slurm's controller is down"


def check_profile(profile: Profile, where: str) -> None:
    """Raises UserError, before submission, for a profile that no node of the partition can ever run."""
    listing = _ask("sinfo", "-a", "-h", "-e", "-o", "%P|%D|%c|%m|%l|%G")
    rows = [line.split("|") for line in listing.splitlines() if line.count("|") == 5]
    names = [row[0].rstrip("*") for row in rows]
    default = next((row[0].rstrip("*") for row in rows if row[0].endswith("*")), None)
    asked = profile.partition or os.environ.get("SBATCH_PARTITION") or default
    if asked is None:
        return  # the cluster chooses one for the job
    partitions = asked.split(",")  # Slurm takes the first that fits
    for name in partitions:
        if name not in names:
            raise UserError(
                f"{where}: partition {name}: not on this cluster; it has {', '.join(dict.fromkeys(names))}"
            )
    problems = [
        _too_much(profile, where, name, [row for row, of in zip(rows, names, strict=True) if of == name])
        for name in partitions
    ]
    if all(problems):
        raise UserError(str(problems[0]))


def _too_much(profile: Profile, where: str, partition: str, rows: Sequence[Sequence[str]]) -> str | None:
    """What a profile asks for that no node of a partition has, in a line; None if it fits."""
    total = sum(_number(row[1]) for row in rows)
    if profile.nodes > total:
        return f"--nodes {profile.nodes}: partition {partition} has {total} node(s)"
    tasks, cpus = profile.tasks_per_node, profile.tasks_per_node * profile.cpus_per_task
    if cpus > (most := max(_number(row[2]) for row in rows)):
        return (
            f"{where}: {tasks} tasks_per_node x {profile.cpus_per_task} cpus_per_task: a node of partition {partition} has at "
            f"most {most} CPUs"
        )
    if profile.mem_gb * 1024 > (memory := max(_number(row[3]) for row in rows)):
        return f"{where}: mem_gb {profile.mem_gb}: a node of partition {partition} has at most {memory / 1024:.1f} GB"
    gpus = max(_gpus(row) for row in rows)
    if profile.gpus_per_node > gpus:
        return f"{where}: gpus_per_node {profile.gpus_per_node}: a node of partition {partition} has at most {gpus}"
    if profile.nodes > (fit := sum(_number(row[1]) for row in rows if _fits(profile, row))):
        gpus_each = f", {profile.gpus_per_node} GPUs" if profile.gpus_per_node else ""
        return (
            f"--nodes {profile.nodes}: partition {partition} has {fit} node(s) with the {cpus} CPUs{gpus_each} and "
            f"{profile.mem_gb} GB of {where}"
        )
    if profile.time_minutes > (limit := max(_minutes(row[4]) for row in rows)):
        return f"{where}: time_minutes {profile.time_minutes}: partition {partition} allows {limit:.0f}"
    return None


def _fits(profile: Profile, row: Sequence[str]) -> bool:
    """Whether nodes as `check_profile` lists them are large enough for a profile."""
    cpus = profile.tasks_per_node * profile.cpus_per_task
    enough = cpus <= _number(row[2]) and profile.mem_gb * 1024 <= _number(row[3])
    return enough and profile.gpus_per_node <= _gpus(row)


def _gpus(row: Sequence[str]) -> int:
    return sum(map(int, re.findall(r"gpu(?::[^:,(]+)?:(\d+)", row[5])))


def refusal(said: str) -> Exception:
    """The error for what sbatch said: UserError for a job that it never takes, else WorkError."""
    words = " ".join(re.sub(r"\b(sbatch|error|Batch job submission failed): ", "", said).split())
    if may_heal(words):
        return WorkError(f"Slurm does not take the job now: {words}; nothing was submitted")
    return UserError(f"Slurm refuses this job: {words}; nothing was submitted")


def may_heal(said: str) -> bool:
    """Whether an error is about the state of Slurm's controller or of a disk, which may change."""
    return (
        re.search(
            "contact|timed out|did not answer|temporarily|connection|credential|authentication|Zero Bytes|No space left|"
            "Disk quota",
            said,
            re.IGNORECASE,
        )
        is not None
    )


def job_states(jobs: Iterable[str], owner: str) -> dict[str, JobState]:
    """The states of a user's jobs, by id; jobs that Slurm does not know are omitted.

    They come from squeue, and for finished jobs from sacct if there is accounting (if it does not answer, they
    are UNACCOUNTED); without it the controller remembers them only for a while (MinJobAge, usually five
    minutes). Raises WorkError if the controller does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    listing = _ask("squeue", "-a", "-h", "-r", "-t", "all", "-u", owner, "-o", "%i|%T|%r|%N|%e|%B")
    found = {
        row[0]: JobState(*row[1:])
        for row in (line.split("|") for line in listing.splitlines())
        if row[0] in wanted and len(row) == 6
    }
    forgotten = sorted(wanted - found.keys())
    if forgotten and has_accounting():
        try:
            columns = ("-X", "-n", "-P", "-o", "JobID,State,NodeList,End")
            listing = _ask("sacct", *columns, "-j", ",".join(forgotten), seconds=ACCOUNTING_SECONDS)
        except WorkError as error:  # squeue's answer is still valid
            console.say(f"Slurm's accounting does not answer: {error}")
            return found | dict.fromkeys(forgotten, JobState(UNACCOUNTED))
        for line in listing.splitlines():
            job, state, nodes, end = line.split("|")
            found[job] = JobState(state.split()[0], "", nodes, end)  # "CANCELLED by 0"
    return found


def patiently(ask: Callable[[], Answer], outage: float = OUTAGE_SECONDS) -> Answer:
    """The answer of `ask`, which runs a command of Slurm, for a process inside a job.

    While the controller is silent, as when it restarts, it is asked again for `outage` seconds (so is a disk
    that is full). Raises WorkError after that, or sooner if it refuses.
    """
    waited = 0.0
    while True:
        asked = time.monotonic()
        try:
            return ask()
        except WorkError as error:
            # at most what a command takes: the job may have been suspended meanwhile
            waited += min(time.monotonic() - asked, COMMAND_SECONDS) + PAUSE_SECONDS
            if waited > (outage if may_heal(str(error)) else REFUSED_SECONDS):
                raise
            liveness.moved()
            time.sleep(PAUSE_SECONDS)


@functools.cache
def _configuration() -> dict[str, str]:
    """The output of `scontrol show config`."""
    pairs = re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", _ask("scontrol", "show", "config"), re.MULTILINE)
    return dict(pairs)


def cluster_name() -> str:
    """The name of the cluster whose controller answers."""
    return _configuration().get("ClusterName", "")


def node_timeout() -> float:
    """Seconds after which Slurm gives up a silent node."""
    return float(_number(_configuration().get("SlurmdTimeout", "300")))


def has_accounting() -> bool:
    """Whether sacct can answer."""
    storage = _configuration().get("AccountingStorageType", "")
    return storage.endswith("/slurmdbd") and shutil.which("sacct") is not None


def who_ends(job: str, attempt: int) -> Literal["requeued", "time limit", "preempted", "cancelled"] | None:
    """Why Slurm is ending a running job: `requeued`, `time limit`, `preempted` or `cancelled`; None if it is not.

    In all these cases its state is COMPLETING. After a requeue the job has one more restart than this
    attempt; at a time limit the limit is reached; a job that was preempted and may not be requeued has a time of
    that; otherwise it was scancel, unless the job lost a node and may not be requeued. Raises WorkError if the
    controller does not answer.
    """
    fields = _fields(job)
    state = fields.get("JobState")
    if int(fields.get("Restarts", attempt)) > attempt:
        return "requeued"
    if state == "TIMEOUT" or (
        state == "COMPLETING" and _minutes(fields["RunTime"]) >= _minutes(fields["TimeLimit"])
    ):
        return "time limit"
    if fields.get("Reason") == "NodeDown":
        return None
    if state in ("COMPLETING", "PREEMPTED") and _was_preempted(fields):
        return "preempted"
    return "cancelled" if state in ("COMPLETING", "CANCELLED") else None


def why_told(job: str, save_seconds: int) -> Literal["preempted", "time limit", "signal"]:
    """Why a running job was asked to end: `preempted`, `time limit`, or `signal` if it is neither.

    Raises WorkError if the controller does not answer.
    """
    fields = _fields(job)
    if _was_preempted(fields):
        return "preempted"
    left = 60 * (_minutes(fields["TimeLimit"]) - _minutes(fields["RunTime"]))
    return "time limit" if left < save_seconds + 60 else "signal"


def _was_preempted(fields: Mapping[str, str]) -> bool:
    return fields.get("PreemptTime", "None") not in ("None", "N/A")


def job_nodes(job: str) -> list[str]:
    """The nodes that a job has now. Raises WorkError if the controller does not answer."""
    nodes = _fields(job).get("NodeList", "(null)")
    return [] if nodes == "(null)" else host_names(nodes)


def host_names(hosts: str) -> list[str]:
    """The names that Slurm abbreviates as node[1-3]. Raises WorkError or UserError if it does not answer."""
    return _ask("scontrol", "show", "hostnames", hosts).split()


def requeue_job(job: str, attempt: int) -> None:
    """Requeue a job, unless somebody requeued or cancelled this attempt. Raises WorkError if Slurm refuses."""
    if who_ends(job, attempt) not in ("requeued", "preempted", "cancelled"):
        _ask("scontrol", "requeue", job)


def own_job() -> str:
    """The id of the job in which this process runs.

    In an array it is the task's, as the number in SLURM_JOB_ID may stand for the whole array.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def cancel_jobs(jobs: Iterable[str], *, pending: bool = False) -> None:
    """Cancel jobs; those that have ended stay as they are. `pending`: only those that wait.

    Raises WorkError if Slurm refuses.
    """
    try:
        _ask("scancel", *(["--state=PENDING"] if pending else []), *jobs)
    except WorkError as error:
        if "Invalid job id" not in str(error):
            raise


def _fields(job: str) -> dict[str, str]:
    """The output of `scontrol show job`."""
    return dict(
        word.split("=", 1) for word in _ask("scontrol", "show", "job", "-o", job).split() if "=" in word
    )


def _ask(*command: str, seconds: float = COMMAND_SECONDS) -> str:
    try:
        done = _run(*command, seconds=seconds)
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on PATH; load Slurm's module") from None
    except subprocess.TimeoutExpired:
        raise WorkError(f"{command[0]} did not answer within {seconds:g} s") from None
    if done.returncode:
        raise WorkError(f"{command[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def _run(*command: str, seconds: float) -> subprocess.CompletedProcess[str]:
    # a user's defaults for these commands would change their output
    filters = ("SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_", "SCANCEL_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(filters)}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=env)


def user_name(uid: int) -> str:
    """A user's name, or the number if it has no name here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _number(text: str) -> int:
    """The number in a column such as `64` or `64+`."""
    digits = re.match(r"\d+", text)
    assert digits is not None, text
    return int(digits[0])


def _minutes(limit: str) -> float:
    """Minutes of a time such as 1-00:00:00 or 30:00; infinite for words such as UNLIMITED."""
    minutes = slurm_minutes(limit)
    return float("inf") if minutes is None else minutes
