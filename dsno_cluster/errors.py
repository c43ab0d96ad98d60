"""The two kinds of failure that are reported in one line; anything else is a bug and shows a traceback."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """The input is wrong: a key, an option, a path. Exit status 2."""


class WorkError(Exception):
    """The work or its surroundings failed: storage, a node, a disk. Exit status 1."""


class StorageError(WorkError):
    """The storage failed, after retries if the error was transient: further writes will fail as well."""


class Preempted(KeyboardInterrupt):
    """The node must be given up: the time limit is near, or another job needs it. The work so far is saved.

    The work may be started again. Like KeyboardInterrupt, this is not an Exception, so no handler takes it
    for a failure.
    """


LOST_RANK = "another rank was lost"  # how a rank reports that it is not the cause
LONE_SIGNAL = "a signal ended this rank and no other"  # as it seems to that rank; Slurm may know better


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The one of `choices` nearest to `word`, for `did you mean ...?`; None if none is near."""
    return next(iter(difflib.get_close_matches(word, choices, n=1)), None)


def said_by(library: str, error: BaseException) -> str:
    """`LIBRARY says: ...`: the error of another library in one line, to be part of a message of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{library} says: {text[:160]}{'...' if len(text) > 160 else ''}"


def without_passwords(text: str) -> str:
    """`text` without the user:password of its URLs; every message shown to people passes through here."""
    return re.sub(r"://[^\s/@]*:[^\s@]*@", "://***@", text)
