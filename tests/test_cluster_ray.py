"""gen-trajectories on a Ray cluster that is given: killed actors, lost nodes, nodes that join."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import DATA, TINY, answer, dsno

from dsno_cluster import load_teacher, solve
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.teachers.importing import import_weights

SLOW = [*TINY, "trajectories.steps=160", "trajectories.num_samples=384"]  # 24 shards of about half a second

TOKEN = secrets.token_hex(32)  # Ray reads it once a process


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray head without CPUs; nodes are added by the test. Several raylets on one machine, as Ray tests itself."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def solver_actors() -> list[int]:
    """Process ids of the actors that solve on this test's cluster: other tests may run beside it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            ours = entry.name.isdigit() and TOKEN.encode() in (entry / "environ").read_bytes()
            if ours and b"ray::SolveActor" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def shards(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(root.glob("trajectories/*/shard-*"))}


@pytest.mark.slow
def test_actors_killed_nodes_lost_and_nodes_that_join(ray_cluster: Any, tmp_path: Path) -> None:
    ray_cluster.add_node(num_cpus=1)
    lost = ray_cluster.add_node(num_cpus=1)
    root = tmp_path / "cluster"
    words = ["gen-trajectories", *SLOW, f"storage.root={root}", "--launcher", "local"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "dsno_cluster.cli", *words, "--ray-address", ray_cluster.address],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(shards(root)) >= 2)
    assert len(solver_actors()) == 2  # one on each node
    os.kill(solver_actors()[0], signal.SIGKILL)
    wait_for(lambda: len(shards(root)) >= 6)
    ray_cluster.remove_node(lost, allow_graceful=False)
    kept = ray_cluster.worker_nodes.copy()
    wait_for(lambda: len(shards(root)) >= 10)
    ray_cluster.add_node(num_cpus=2)
    wait_for(lambda: len(solver_actors()) == 3)  # the new node is used
    for node in kept:  # and now only the new one is left
        ray_cluster.remove_node(node, allow_graceful=False)
    _, stderr = driver.communicate(timeout=180)
    assert driver.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert re.search(r"room for 2 actor\(s\) on \d node\(s\) now", stderr) and "Ray has room for" in stderr, (
        stderr
    )
    wait_for(lambda: not solver_actors())  # none is left behind on a cluster that goes on

    made = shards(root)
    assert len(made) == 24
    torch.set_num_threads(1)
    teacher, times = load_teacher("package:digits-teacher"), (0.5625, 0.25, 0.0625, 0.0)
    for index in (0, 12, 23):  # the bytes that one process alone makes
        samples = range(16 * index, 16 * index + 16)
        noise, labels = sample_noise(0, samples, (1, 8, 8)), sample_labels(0, samples, 10)
        states = solve(teacher, noise, times, "dpmpp-2m", 160, labels)
        found = safetensors.torch.load(made[f"shard-{index:06d}.safetensors"])["states"]
        assert torch.equal(found, states.transpose(0, 1).half())
    folder = next((root / "trajectories").iterdir())
    assert answer("verify", str(folder)).returncode == 0
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".tmp") == [
        "manifest.json",
        *shards(root),
    ]


def test_a_cluster_without_room_for_one_actor_is_refused(ray_cluster: Any, tmp_path: Path) -> None:
    ray_cluster.add_node(num_cpus=1)
    words = ["gen-trajectories", *TINY, "trajectories.threads=2", f"storage.root={tmp_path}"]
    words += ["--launcher", "local", "--ray-address", ray_cluster.address]
    for actors in ([], ["--actors", "1"]):
        refused = dsno(*words, *actors, timeout=90)
        assert refused.returncode == 2, refused.stderr
        assert "no node has the 2 CPUs that one actor takes" in refused.stderr, refused.stderr


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    words = ["gen-trajectories", *TINY, f"storage.root={tmp_path}", "--launcher", "local"]
    failed = dsno(*words, "--ray-address", "127.0.0.1:1")
    assert failed.returncode == 1, failed.stderr
    assert "127.0.0.1:1" in failed.stderr and "Traceback" not in failed.stderr, failed.stderr


@pytest.mark.slow
def test_relative_paths_are_those_of_who_calls(ray_cluster: Any, tmp_path: Path) -> None:
    """Not those of the folder that Ray was started in."""
    ray_cluster.add_node(num_cpus=1)
    published = DATA / "published/one_point"
    import_weights(
        str(published / "solver-model_1000.pt"), str(published / "config.yaml"), str(tmp_path / "student")
    )
    words = ["sample", "student", "--num", "8", "--batch-size", "4", "--shards", "drawn"]
    drawn = dsno(*words, "--ray-address", ray_cluster.address, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert answer("verify", str(tmp_path / "drawn")).returncode == 0
