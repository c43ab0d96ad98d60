"""Two real Slurm nodes make the shards that this machine makes alone, and leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster_users import User, ray_processes, started
from tiny import TINY


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_two_nodes_make_the_same_shards(tiny_data: Path) -> None:
    with started(2) as cluster:
        user = User.new(cluster, "smoke")
        said = user.dsno("gen-trajectories", *TINY, *user.storage, "--nodes", "2", "--wait")
        run = user.run_of(said.stderr)
        assert user.ends(run)["attempts"] == 1
        log = run.attempt(0).log(0).read_text()
        assert "1 other node(s) join" in log and "submitit INFO" not in log, log
        (here,) = tiny_data.glob("trajectories/*/manifest.json")
        there = user.manifest()
        assert there["key"] == f"trajectories/{here.parent.name}/manifest.json"
        assert there["shards"] == json.loads(here.read_text())["shards"]
        user.verify()
        assert not [p for node in cluster.node_names for p in ray_processes(cluster, node)]
