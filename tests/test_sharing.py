"""Tasks that share a data set without talking to each other: the bytes that one run makes, whoever comes and goes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import TINY

from dsno_cluster.cluster.crew import Crew
from dsno_cluster.config import load_config
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.provenance import Environment
from dsno_cluster.trajectories.generate import generate
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.shards import MadeShards, Shard
from dsno_cluster.trajectories.sharing import Share, together

TASK = """
import sys
from dsno_cluster.cluster.crew import Crew
from dsno_cluster.config import load_config
from dsno_cluster.trajectories.generate import generate
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.sharing import Share
config = load_config("configs/digits.yaml", sys.argv[3:])
print(generate(config, make_plan(config), Crew(actors=1), Share(int(sys.argv[1]), int(sys.argv[2]))))
"""


def start(place: int, count: int, words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TASK, str(place), str(count), *words]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE)


def content(root: Path) -> dict[str, bytes]:
    (folder,) = (root / "trajectories").iterdir()
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


def same_data(root: Path, whole: Path) -> None:
    """The shards of a data set and no other files, byte by byte, and a manifest that names them alike."""
    found, expected = content(root), content(whole)
    ours, theirs = (json.loads(files.pop("manifest.json")) for files in (found, expected))
    assert found == expected and ours["shards"] == theirs["shards"]


@pytest.mark.parametrize(("count", "of"), [(6, 2), (7, 3), (5, 8)])
def test_each_begins_with_its_own_and_makes_all_in_the_end(count: int, of: int) -> None:
    orders = [Share(place, of).in_order(range(count)) for place in range(of)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    shares = [order[: len(range(place, count, of))] for place, order in enumerate(orders)]
    assert sorted(index for share in shares for index in share) == list(range(count))


def test_tasks_that_never_start_and_hours_apart(tiny_data: Path, tmp_path: Path) -> None:
    """The third of four makes everything, long before the others; one that comes late finds nothing to do."""
    words = [*TINY, f"storage.root={tmp_path}"]
    alone = start(2, 4, words)
    said = alone.communicate()[1]
    assert alone.returncode == 0, said
    same_data(tmp_path, tiny_data)
    late = start(0, 4, words)
    said = late.communicate()[1]
    assert late.returncode == 0 and "all 6 shards exist already" in said, said
    same_data(tmp_path, tiny_data)


@pytest.mark.slow
def test_tasks_at_once_of_which_one_is_killed(tiny_data: Path, tmp_path: Path) -> None:
    words = [*TINY, f"storage.root={tmp_path}"]
    tasks = [start(place, 3, words) for place in range(3)]
    while not list(tmp_path.glob("trajectories/*/shard-*")):
        assert tasks[0].poll() is None
        time.sleep(0.1)
    tasks[0].send_signal(signal.SIGKILL)
    said = [task.communicate()[1] for task in tasks]
    assert [task.returncode for task in tasks] == [-signal.SIGKILL, 0, 0], said
    assert not any("Traceback" in text for text in said)
    same_data(tmp_path, tiny_data)


def test_the_notes_of_others_are_read_in_place_of_their_shards(tiny_data: Path, tmp_path: Path) -> None:
    """What they made on another kind of device is not mixed with what is made here."""
    config = load_config("configs/digits.yaml", [*TINY, f"storage.root={tmp_path}"])
    plan = make_plan(config)
    folder = tmp_path / plan.folder
    folder.mkdir(parents=True)
    (folder / "progress-1.json").write_text(json.dumps({"environment": {"device": "another"}, "shards": []}))
    with pytest.raises(UserError, match="was made on another, this is"):
        generate(config, plan, Crew(actors=1), Share(0, 2))
    # and the refused task leaves no notes, for which others would be refused
    assert [file.name for file in folder.iterdir()] == ["progress-1.json"]


def test_the_environment_of_all_notes_is_that_of_the_shards() -> None:
    shard = Shard(key="shard-000000.safetensors", start=0, stop=16, size=1, sha256="0")
    here = Environment(device="here", versions={}, seconds=2.0)
    idle = MadeShards(environment=here.model_copy(update={"device": "another"}))
    found = together([idle, MadeShards(environment=here, shards=((shard, "etag"),))]).environment
    assert found is not None and (found.device, found.seconds) == ("here", 4.0)


def test_a_repair_with_other_bits_is_not_reported_as_done(tiny_data: Path, tmp_path: Path) -> None:
    """As after an upgrade of a library: the shard made again is not the one that the manifest names."""
    shutil.copytree(tiny_data / "trajectories", tmp_path / "trajectories")
    config = load_config("configs/digits.yaml", [*TINY, f"storage.root={tmp_path}"])
    plan = make_plan(config)
    folder = tmp_path / plan.folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][2]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / manifest["shards"][2]["key"]).unlink()
    with pytest.raises(
        WorkError, match=r"manifest.json: names other bytes for shard-000002.* than were just made"
    ):
        generate(config, plan, Crew(actors=1), Share(0, 2))


def test_all_is_finished_elsewhere_before_an_actor_is_ready(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("configs/digits.yaml", [*TINY, f"storage.root={tmp_path}"])
    plan = make_plan(config)

    def others_finish(*_: object) -> None:
        shutil.copytree(tiny_data / "trajectories", tmp_path / "trajectories", dirs_exist_ok=True)

    monkeypatch.setattr("dsno_cluster.trajectories.generate.say_compiling", others_finish)
    monkeypatch.setattr("dsno_cluster.cluster.ray_pool.ELSEWHERE_SECONDS", 0.0)
    assert generate(config, plan, Crew(actors=1), Share(0, 2)).startswith(str(tmp_path))
    same_data(tmp_path, tiny_data)
