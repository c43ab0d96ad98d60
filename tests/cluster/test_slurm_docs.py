"""The documents' commands for a cluster, one after the other as a reader gives them, on the test cluster."""

from __future__ import annotations

import re

import pytest
from cluster_users import User
from documents import PAGES, Command, as_run, commands, on_cluster

from dsno_cluster.cluster.runs import Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

NODES = 2  # as many as show that there are several; starting Ray on more takes its time


def test_commands_for_a_cluster_run(user: User) -> None:
    newest: Run | None = None
    done: set[tuple[str, ...]] = set()
    for command in commands():
        if not on_cluster(command):
            continue
        if "RUN" in command.words and newest is None:  # a page about runs that submits none
            newest = user.submit("gen-trajectories", *as_run(shown("dsno-cluster gen-trajectories"), {})[1:])
            user.ends(newest)
        words = as_run(command, names(user, newest))
        if tuple(words) in done:  # another page has it too
            continue
        done.add(tuple(words))
        said = user.dsno(*words, *storage(user, words)).stderr
        for line in said.splitlines():
            if "submitted" in line:
                newest = user.run_of(line)
                user.ends(newest)
    assert len(done) > 10


def shown(text: str) -> Command:
    return Command(PAGES[0], 0, text)


def names(user: User, run: Run | None) -> dict[str, str]:
    """What the placeholders stand for here, and as many nodes as there are."""
    found = {
        "CONFIG": "configs/digits.yaml",
        "RUN": run.id if run else "",
        "s3://bucket/prefix": user.root,
        "http://HOST:PORT": user.cluster.s3_url,
        "16": str(NODES),
    }
    return found | ({"HASH": user.manifest()["key"].split("/")[1]} if run else {})


def storage(user: User, words: list[str]) -> list[str]:
    """The user's storage, for commands that take a config, where the command itself does not say."""
    if words[0] not in ("gen-trajectories", "train", "eval", "run") or "--help" in words:
        return []
    own = {re.split("=", word)[0] for word in words}
    return [word for word in user.storage if word.partition("=")[0] not in own]
