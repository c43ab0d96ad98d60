"""Fixtures of the cluster tests: four nodes for all of them, a user for each."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from cluster_users import User, is_up, started, wait_for
from testbed import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes, without accounting."""
    with started(4) as running:
        yield running


@pytest.fixture
def user(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[User]:
    """A user whose storage is on S3."""
    yield from _user(cluster, request.node.name, on_s3=True)


@pytest.fixture
def disk_user(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[User]:
    """A user whose storage is on the shared disk."""
    yield from _user(cluster, request.node.name, on_s3=False)


def _user(cluster: Cluster, name: str, on_s3: bool) -> Iterator[User]:
    yield User.new(cluster, re.sub(r"\W+", "-", name).removeprefix("test_"), on_s3)
    cluster.run("scancel", "--full", "-u", "root", check=False)
    wait_for(lambda: not cluster.run("squeue", "-h").stdout.strip(), 60)
    for node in cluster.node_names:  # what a test broke is mended for the next
        if not is_up(cluster, node):
            cluster.boot_node(node)
    wait_for(lambda: len(cluster.idle_nodes()) == cluster.nodes, 60)
