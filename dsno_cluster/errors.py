"""The two kinds of failure that people are told of in one line; anything else is a bug with a traceback."""

from __future__ import annotations


class UserError(Exception):
    """The input is wrong: a key, an option, a path. Exit status 2."""


class WorkError(Exception):
    """The work or its surroundings failed: storage, a node, a disk. Exit status 1."""
