"""Why an attempt ended: from what its tasks noted, and from what srun, Slurm and the kernel reported."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from dsno_cluster.cluster.records import Begin, Outcome, Stopped
from dsno_cluster.cluster.runs import BATCH_LOG, Attempt
from dsno_cluster.cluster.slurm_commands import host_names
from dsno_cluster.cluster.srun_lines import Line, lines_about_the_end, task_end, trouble
from dsno_cluster.cluster.task import STOPS
from dsno_cluster.errors import LONE_SIGNAL, LOST_RANK, UserError, WorkError

KILLED = 128  # a shell's exit status is this much above the number of the signal
NOTICES = {
    "NODE FAILURE": "Slurm lost a node of the job",
    "TIME LIMIT": "its time limit was reached before it had saved",
    "PREEMPTION": "another job needed its nodes, and it had no time to save",
    "JOB REQUEUE": "it was requeued",
}
TAKEN_BY_SLURM = (NOTICES["PREEMPTION"], NOTICES["JOB REQUEUE"])


def why(attempt: Attempt, status: int | None) -> str:
    """Why an attempt ended, in a line.

    `status` is that of srun, known to the batch script; None for everybody else.
    """
    failure, stopped = attempt.failure(), attempt.read(Stopped)
    if failure is not None and not failure.reason.startswith((LOST_RANK, LONE_SIGNAL)):
        return failure.reason
    if stopped is not None:
        # Slurm ends a job that loses a node as it ends one that another job preempts
        return STOPS[stopped.why] if stopped.why != "preempted" else _lost_node(attempt) or STOPS[stopped.why]
    if (reason := _reason_of_slurm(attempt, on_first_node=status is not None)) is not None:
        return reason
    if failure is not None:
        return failure.reason
    if status is None:
        nodes = (attempt.read(Begin) or Begin()).nodes
        return f"its batch script left no word of its end, as after the loss of a node ({nodes})"
    if lost := lost_nodes(attempt):
        return lost[0]
    if ended := [line for line in lines_about_the_end(_said_by_slurm(attempt)) if line.exited]:
        return f"{task_end(ended[0])}; see {attempt.folder}"
    if status > KILLED:
        name = signal.Signals(status - KILLED).name if status - KILLED in set(signal.Signals) else "a signal"
        return f"srun or one of its tasks was ended by {name}{_kernel_kills(attempt)}; see {attempt.folder}"
    return f"srun ended with status {status} and no task said why; see {attempt.folder} and {BATCH_LOG}"


def how_it_ended(attempt: Attempt) -> str:
    """Why an attempt that is over ended, as its batch script noted it, or else from what was left behind."""
    outcome = attempt.read(Outcome)
    return why(attempt, None) if outcome is None else outcome.reason


def lost_nodes(attempt: Attempt) -> list[str]:
    """Why a Ray stage lost other nodes, a reason for each: what the node reported, or what Slurm did."""
    if not attempt.run.is_ray_stage:
        return []
    lines = lines_about_the_end(_said_by_slurm(attempt))
    ended = [line for line in _before_teardown(lines) if line.is_of_others and not line.exited]
    reasons = {host: task_end(line) for line in ended for host in _names(line.hosts)}
    reasons |= {_short(lost.host): lost.reason for lost in attempt.node_losses()}
    for line in lines:
        for host in _names(line.hosts) if line.kind == "node" else ():
            reasons.setdefault(host, f"Slurm lost {host}")  # a node may be lost after its task was killed
    return list(reasons.values())


def oom_kills() -> int | None:
    """How many processes the kernel of this machine has killed for lack of memory; None if it does not say."""
    try:
        counters = Path("/proc/vmstat").read_text()
    except OSError:
        return None
    count = re.search(r"^oom_kill (\d+)$", counters, re.MULTILINE)
    return int(count[1]) if count else None


def _reason_of_slurm(attempt: Attempt, *, on_first_node: bool) -> str | None:
    """The cause that Slurm's own lines name; None if they name none. `on_first_node`: whether this process is.

    What ended first is the cause: srun then ends the other tasks. A Ray stage continues without other nodes,
    so only its first task and the end of the whole step count.
    """
    said = _said_by_slurm(attempt)
    lines = lines_about_the_end(said)
    if attempt.run.is_ray_stage:
        lines = [line for line in lines if line.kind != "node" and not line.is_of_others]
    ends = [line for line in _before_teardown(lines) if line.kind == "task"][:1]
    for line in lines:
        if line in ends and not line.exited:
            here = on_first_node and _short(socket.gethostname()) in _names(line.hosts)
            return f"{task_end(line)}{_kernel_kills(attempt) if here else ''}; see {attempt.folder}"
        if line.kind == "start":
            return _not_started(line, said)
        if line.kind in ("memory", "node", "contact") or line.text in NOTICES:
            return _cause(line, attempt)
    return None


def _lost_node(attempt: Attempt) -> str | None:
    """What Slurm reported if it ended the job because a node was lost."""
    lines = lines_about_the_end(_said_by_slurm(attempt))
    if not any(line.text == "NODE FAILURE" for line in lines):
        return None
    nodes = [line for line in lines if line.kind == "node"]
    return _cause(nodes[0], attempt) if nodes else NOTICES["NODE FAILURE"]


def _cause(line: Line, attempt: Attempt) -> str:
    if line.kind == "memory":
        if line.tasks:
            return task_end(line)
        return f"it ran out of memory, as Slurm reports ({line.text}): raise mem_gb"
    if line.kind == "node":
        return f"Slurm lost {', '.join(_names(line.hosts))}"
    if line.kind == "contact":
        return f"Slurm lost its connection to {_node(attempt, line.index)} ({line.text})"
    return NOTICES[line.text]


def _not_started(line: Line, said: str) -> str:
    cause, where = trouble(said), f" on {line.hosts}" if line.hosts else ""
    more = f" ({cause})" if cause is not None and cause not in line.text else ""
    return f"Slurm did not start the tasks{where}: {line.text}{more}"


def _before_teardown(lines: Sequence[Line]) -> list[Line]:
    """The lines before Slurm or srun began to end the step: what it then kills is not the cause."""
    ends = [index for index, line in enumerate(lines) if line.kind in ("teardown", "notice")]
    return list(lines[: ends[0]] if ends else lines)


def _kernel_kills(attempt: Attempt) -> str:
    """What the kernel of this machine, the first node, did since the attempt began."""
    before, now = (attempt.read(Begin) or Begin()).oom_kills, oom_kills()
    if before is None or now is None or now <= before:
        return ""
    return (
        f"; since the attempt began, the kernel of {_short(socket.gethostname())} killed {now - before} process(es) for "
        "lack of memory (mem_gb)"
    )


def _node(attempt: Attempt, index: int | None) -> str:
    """The name of a node by its place in the job's list."""
    nodes = (attempt.read(Begin) or Begin()).nodes or ""
    names = _names(nodes)
    return (
        names[index]
        if index is not None and index < len(names) and "[" not in names[0]
        else f"node {index} of {nodes}"
    )


def _names(hosts: str) -> list[str]:
    """Names that Slurm abbreviates; the abbreviation if it cannot be asked."""
    if "[" not in hosts and "," not in hosts:
        return [hosts]
    try:
        return host_names(hosts)
    except (UserError, WorkError):
        return [hosts]


def _short(host: str) -> str:
    """A host's name as Slurm uses it, without a domain."""
    return host.partition(".")[0]


def _said_by_slurm(attempt: Attempt) -> str:
    """An attempt's part of the batch log, in which srun and slurmstepd print."""
    begin = (attempt.read(Begin) or Begin()).batch_log_bytes
    later = [a for a in attempt.run.attempts() if a.number > attempt.number]
    end = next((begun.batch_log_bytes for a in later if (begun := a.read(Begin)) is not None), None)
    try:
        return (attempt.run.folder / BATCH_LOG).read_bytes()[begin:end].decode(errors="replace")
    except OSError:
        return ""
