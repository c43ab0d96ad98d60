"""The two kinds of failure that people are told of in one line; anything else is a bug with a traceback."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """The input is wrong: a key, an option, a path. Exit status 2."""


class WorkError(Exception):
    """The work or its surroundings failed: storage, a node, a disk. Exit status 1."""


class StorageError(WorkError):
    """The storage failed, and what can heal was tried again: the next thing to store will fail as well."""


class Preempted(KeyboardInterrupt):
    """The surroundings ask for the node: time is nearly up, or another job needs it. What is done is saved.

    Whoever started the work may start it again. Like Ctrl-C, it is no Exception, so that nothing takes it for a failure.
    """


LOST_RANK = "another rank was lost"  # how a rank says that it is not to blame


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The one of `choices` that was probably meant by `word`, for `did you mean ...?`; None if none is near."""
    return next(iter(difflib.get_close_matches(word, choices, n=1)), None)


def without_passwords(text: str) -> str:
    """`text` with user:password of every URL in it left out; what is shown to people goes through here."""
    return re.sub(r"://[^\s/@]*:[^\s@]*@", "://***@", text)
