"""What srun and slurmstepd print when a step ends, as data."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["task", "memory", "node", "contact", "start", "notice", "teardown"]

# the first that matches a line counts; `hosts` are as Slurm abbreviates them, such as node[1-3]
_LINES: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("node", re.compile(r"srun: error: Node failure on (?P<hosts>\S+)")),
    (
        "memory",
        re.compile(r"srun: error: (?P<hosts>\S+): tasks? (?P<tasks>[\d,-]+)[^:]*: (?P<text>Out Of Memory)"),
    ),
    ("memory", re.compile(r"(?P<text>Detected \d+ oom.kill event\(?s?\)?)", re.IGNORECASE)),
    ("memory", re.compile(r"(?P<text>\S+ exceeded (?:virtual )?memory limit|Exceeded job memory limit)")),
    ("task", re.compile(r"srun: error: (?P<hosts>\S+): tasks? (?P<tasks>[\d,-]+)[^:]*: (?P<text>.+)")),
    ("start", re.compile(r"Task launch for \S+ failed on node (?P<hosts>\S+): (?P<text>.+)")),
    (
        "start",
        re.compile(
            r"srun: (?:error|fatal): (?P<text>(?:Unable to|Application launch failed|Failed to create).*)"
        ),
    ),
    ("contact", re.compile(r"Aborting, (?P<text>.+) on node (?P<index>\d+)")),
    ("contact", re.compile(r"(?P<text>Cannot communicate) with node (?P<index>\d+)")),
    (
        "notice",
        re.compile(
            r"\*\*\* (?:JOB|STEP) \S+ ON (?P<hosts>\S+) CANCELLED AT \S+(?: DUE TO (?P<text>[A-Z ]+))?"
        ),
    ),
    (
        "teardown",
        re.compile(
            r"srun: (?:Job step aborted|Force Terminated|launch/slurm: _step_signal: Terminating|forcing job|got SIGCONT)"
        ),
    ),
)
_TROUBLE = re.compile(
    r"(?:srun|slurmstepd\S*): error: (?P<text>Munge .+|.*\bauthentication error\b.*|.*\bcredential\b.*|.*Socket timed out.*)"
)
_SIGNALS = {signal.strsignal(number): number.name for number in signal.Signals}
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True)
class Line:
    """A line that says how a step ended.

    `tasks` are numbers as Slurm abbreviates them, such as 0-3; `index` is the place of a node in the step's
    list.
    """

    kind: Kind
    hosts: str = ""
    tasks: str = ""
    text: str = ""
    index: int | None = None

    def is_of_task(self, number: int) -> bool:
        return any(first <= number <= last for first, last in self._ranges())

    @property
    def is_of_others(self) -> bool:
        """Whether it names tasks, and the first task is none of them."""
        return bool(self.tasks) and not self.is_of_task(0)

    @property
    def exited(self) -> bool:
        """Whether its tasks ended by themselves; their notes say why."""
        return self.text.startswith("Exited")

    def _ranges(self) -> Iterator[tuple[int, int]]:
        for part in filter(None, self.tasks.split(",")):
            first, _, last = part.partition("-")
            yield int(first), int(last or first)


def lines_about_the_end(said: str) -> list[Line]:
    """The lines that say how a step ended, in their order."""
    return [line for text in said.splitlines() if (line := _line(text)) is not None]


def trouble(said: str) -> str | None:
    """The first error about authentication or a silent daemon, which Slurm may have survived; None if there is none."""
    found = _TROUBLE.search(said)
    return found["text"].strip() if found else None


def task_end(line: Line) -> str:
    """How tasks ended, for people."""
    one = line.tasks.isdigit()
    who = f"{'task' if one else 'tasks'} {line.tasks} on {line.hosts}"
    name = _SIGNALS.get(line.text.partition(" (")[0])
    if line.kind == "memory":
        return f"{who} ran out of memory, as Slurm reports ({line.text}): raise mem_gb"
    if name is None:
        return f"{who} ended and did not say why ({line.text})"
    return (
        f"{who} {'was' if one else 'were'} killed by {name}, from outside"
        if name in _FROM_OUTSIDE
        else f"{who} crashed: {name}"
    )


def _line(text: str) -> Line | None:
    for kind, pattern in _LINES:
        if found := pattern.search(text):
            said = {key: value for key, value in found.groupdict().items() if value is not None}
            index = said.pop("index", None)
            said = {key: value.strip() for key, value in said.items()}
            return Line(kind, **said, index=None if index is None else int(index))
    return None
